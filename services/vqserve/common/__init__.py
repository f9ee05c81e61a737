"""What both services share: errors, settings, lifecycle, metrics, interception, admission, admin.

Nothing here knows an engine (scq, vqllm) or a service's own RPCs.
"""
