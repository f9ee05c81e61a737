"""Runs one engine on a thread of its own and hands its outputs to asyncio.

The thread is the engine's only caller. The event loop posts commands (add, abort) that the thread
carries out before its next step, so that an abort frees its sequence within one step. Knows no
protobuf and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TypeVarTuple

from vqllm.errors import VqllmError
from vqllm.runtime.engine import EngineStats, StepOutput
from vqllm.runtime.sampling import SamplingParams
from vqllm.runtime.sequence import FinishReason
from vqserve.common.admission import AdmissionGate
from vqserve.common.errors import ServiceError
from vqserve.generation.convert import translate
from vqserve.generation.errors import EngineFailed, EngineStopped
from vqserve.generation.metrics import FinishedSequence, ModelMetrics

_log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")


class SteppingEngine(Protocol):
    """What the driver needs of an engine; `vqllm.runtime.engine.Engine` in production."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Load of the engine now."""
        ...

    def add(self, sequence_id: str, prompt_token_ids: list[int], params: SamplingParams) -> object:
        """Queue a prompt."""
        ...

    def step(self) -> list[StepOutput]:
        """Advance every running sequence."""
        ...

    def abort(self, sequence_id: str) -> bool:
        """Drop a sequence."""
        ...


@dataclass
class Sequence:
    """One prompt, from its arrival to its end. Times are `time.monotonic` seconds.

    The event loop awaits `accepted` and `outputs`; the engine's thread writes the rest.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    arrived_at: float
    accepted: asyncio.Future[None]
    place: contextlib.ExitStack
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    outputs: asyncio.Queue[StepOutput | ServiceError] = field(default_factory=asyncio.Queue)
    num_output_tokens: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None
    finished_at: float | None = None

    @property
    def first_token_after(self) -> float | None:
        """From the arrival to the first token, in seconds; None before it."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def total(self) -> float:
        """From the arrival to the end, or to now, in seconds."""
        return (self.finished_at or time.monotonic()) - self.arrived_at


class SequenceStream:
    """The outputs of one sequence. Leave its `async with` early and the sequence is aborted."""

    def __init__(self, sequence: Sequence, abort: Callable[[str], None]) -> None:
        self.sequence = sequence
        self._abort = abort
        self._is_over = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StepOutput:
        if self._is_over:
            raise StopAsyncIteration
        output = await self.sequence.outputs.get()
        if isinstance(output, ServiceError):
            self._is_over = True
            raise output
        self._is_over = output.finish_reason is not None
        return output

    def close(self) -> None:
        """Abort the sequence unless it has ended."""
        if not self._is_over:
            self._is_over = True
            self._abort(self.sequence.id)


class EngineDriver:
    """Owns one engine and the thread that steps it.

    Public methods belong to the event loop that created the driver. Private methods belong to
    the engine's thread unless they say otherwise.
    """

    def __init__(
        self,
        engine: SteppingEngine,
        gate: AdmissionGate,
        metrics: ModelMetrics,
        on_lost: Callable[[], None],
    ) -> None:
        """`on_lost` is called on the event loop if the engine has to be given up."""
        self._engine = engine
        self._on_lost = on_lost
        self._gate = gate
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._wake = threading.Condition()
        self._arrivals: list[Sequence] = []
        self._departures: list[str] = []
        self._is_stopping = False
        self._sequences: dict[str, Sequence] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes sequences; False once closed or after a fatal failure."""
        return self._thread.is_alive() and not self._is_stopping

    @property
    def num_live(self) -> int:
        """Sequences submitted and not ended."""
        return self._gate.admitted

    async def submit(
        self, prompt_token_ids: list[int], params: SamplingParams, arrived_at: float
    ) -> SequenceStream:
        """Queue a prompt; returns once the engine has accepted it.

        Raises:
            ResourceExhausted: the queue is full.
            InvalidArgument: the engine refuses the prompt.
            Unavailable: the engine has stopped.
        """
        place = self._take_place()
        accepted = self._loop.create_future()
        sequence = Sequence(prompt_token_ids, params, arrived_at, accepted, place)
        with self._wake:
            self._arrivals.append(sequence)
            self._wake.notify()
        try:
            await sequence.accepted
        except asyncio.CancelledError:
            self._abort_later(sequence.id)
            raise
        return SequenceStream(sequence, self._abort_later)

    async def wait_idle(self) -> None:
        """Return once no sequence is live."""
        await self._idle.wait()

    async def close(self) -> None:
        """Abort what still runs and end the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _take_place(self) -> contextlib.ExitStack:
        """(Event loop.)"""
        place = contextlib.ExitStack()
        if not self.is_alive:
            self._metrics.rejected("engine_stopped")
            raise _stopped()
        try:
            place.enter_context(self._gate.admit())
        except ServiceError as error:
            self._metrics.rejected(error.reason.lower())
            raise
        self._idle.clear()
        return place

    def _abort_later(self, sequence_id: str) -> None:
        """(Event loop.)"""
        with self._wake:
            self._departures.append(sequence_id)
            self._wake.notify()

    def _released(self, sequence: Sequence) -> None:
        """A sequence has left the engine, or never entered it. (Event loop.)"""
        sequence.place.close()
        if self._gate.admitted == 0:
            self._idle.set()

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    self._advance()
        except Exception:
            # An abort failed, so the engine's state is lost; the sequences must still be answered.
            _log.exception("engine thread ended")
            self._give_up()

    def _obey(self) -> bool:
        """Carry out what the event loop posted; sleeps while there is nothing to do."""
        with self._wake:
            self._wake.wait_for(self._has_something_to_do)
            arrivals, self._arrivals = self._arrivals, []
            departures, self._departures = self._departures, []
        for sequence in arrivals:
            self._add(sequence)
        for sequence_id in list(self._sequences) if self._is_stopping else departures:
            self._abort(sequence_id)
        self._metrics.load(self._engine.stats)
        return not self._is_stopping

    def _has_something_to_do(self) -> bool:
        is_posted = bool(self._arrivals or self._departures)
        return is_posted or self._is_stopping or self._engine.has_work

    def _advance(self) -> None:
        """Step the engine once and deliver its outputs."""
        started = time.monotonic()
        try:
            outputs = self._engine.step()
        except Exception:  # whatever went wrong, the running requests must be answered
            _log.exception("engine step failed")
            self._fail_all()
            return
        now = time.monotonic()
        self._metrics.step(now - started, len(outputs))
        deliveries = [(self._sequences[output.sequence_id], output) for output in outputs]
        for sequence, output in deliveries:
            self._account(sequence, output, now)
        self._metrics.load(self._engine.stats)
        self._tell(_deliver, deliveries)

    def _add(self, sequence: Sequence) -> None:
        try:
            self._engine.add(sequence.id, sequence.prompt_token_ids, sequence.params)
        except VqllmError as error:
            self._refuse(sequence, translate(error))
        else:
            self._sequences[sequence.id] = sequence
            self._tell(_resolve, sequence, None)

    def _refuse(self, sequence: Sequence, error: ServiceError) -> None:
        self._metrics.rejected(error.reason.lower())
        self._tell(self._released, sequence)
        self._tell(_resolve, sequence, error)

    def _abort(self, sequence_id: str) -> None:
        """Drop a sequence if it is still here, and end its stream."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return
        self._engine.abort(sequence_id)
        output = StepOutput(
            sequence_id=sequence_id,
            token_ids=(),
            text="",
            finish_reason=FinishReason.ABORT,
            num_prompt_tokens=len(sequence.prompt_token_ids),
            num_output_tokens=sequence.num_output_tokens,
            is_first=False,
        )
        self._finish(sequence, FinishReason.ABORT)
        self._tell(_deliver, [(sequence, output)])

    def _fail_all(self) -> None:
        """Answer every sequence of a failed step with an error and clear the engine."""
        self._metrics.engine_failed()
        for sequence in list(self._sequences.values()):
            self._engine.abort(sequence.id)
            self._fail(sequence)

    def _give_up(self) -> None:
        """Answer every sequence with an error, leaving the broken engine alone."""
        self._metrics.engine_failed()
        with self._wake:
            self._is_stopping = True
            arrivals, self._arrivals = self._arrivals, []
        self._tell(self._on_lost)
        for sequence in arrivals:
            self._refuse(sequence, _stopped())
        for sequence in list(self._sequences.values()):
            self._fail(sequence)

    def _fail(self, sequence: Sequence) -> None:
        error = EngineFailed("the engine failed; retry the request")
        self._finish(sequence, "error")
        self._tell(sequence.outputs.put_nowait, error)

    def _account(self, sequence: Sequence, output: StepOutput, now: float) -> None:
        """Time and count one output."""
        if output.token_ids:
            self._account_tokens(sequence, output, now)
        sequence.num_output_tokens = output.num_output_tokens
        if output.finish_reason is not None:
            self._finish(sequence, output.finish_reason)

    def _account_tokens(self, sequence: Sequence, output: StepOutput, now: float) -> None:
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._metrics.prefilled(output.num_prompt_tokens, now - sequence.arrived_at)
        previous = sequence.last_token_at
        gap = None if previous is None else now - previous
        self._metrics.tokens(len(output.token_ids), gap)
        sequence.last_token_at = now

    def _finish(self, sequence: Sequence, reason: str) -> None:
        """Forget a sequence that has left the engine, and count it."""
        del self._sequences[sequence.id]
        sequence.finished_at = time.monotonic()
        self._metrics.load(self._engine.stats)
        self._metrics.finished(
            FinishedSequence(
                reason=reason,
                num_prompt_tokens=len(sequence.prompt_token_ids),
                num_output_tokens=sequence.num_output_tokens,
                first_token_after=sequence.first_token_after,
                total=sequence.total,
            )
        )
        self._tell(self._released, sequence)

    def _tell(self, callback: Callable[[*Ts], object], *arguments: *Ts) -> None:
        """Call something on the event loop; a closed loop has nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)


def _stopped() -> EngineStopped:
    return EngineStopped("the engine of this model has stopped; use another server")


def _resolve(sequence: Sequence, error: ServiceError | None) -> None:
    """Answer `submit`, unless its caller has gone."""
    if sequence.accepted.cancelled():
        return
    if error is None:
        sequence.accepted.set_result(None)
    else:
        sequence.accepted.set_exception(error)


def _deliver(deliveries: list[tuple[Sequence, StepOutput]]) -> None:
    for sequence, output in deliveries:
        sequence.outputs.put_nowait(output)
