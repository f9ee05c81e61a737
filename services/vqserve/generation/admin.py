"""What the admin listener may do with llmd's models."""

from __future__ import annotations

from pathlib import Path

from vqserve.common.admin import LoadedModel
from vqserve.generation.models import ModelTable


class GenerationAdmin:
    """`vqserve.common.admin.ModelAdmin` over the model table."""

    def __init__(self, models: ModelTable) -> None:
        self._models = models

    def model_names(self) -> list[str]:
        """Names of the loaded models, sorted."""
        return [model.name for model in self._models]

    async def load_model(self, path: Path, name: str) -> LoadedModel:
        """Load a folder and serve it beside the others."""
        model = await self._models.load(path, name)
        return LoadedModel(model.name, model.info.revision)

    async def unload_model(self, name: str) -> None:
        """Stop serving a model once its running requests have ended."""
        await self._models.unload(name)
