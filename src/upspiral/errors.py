"""Every error that upspiral raises on purpose.

    UpspiralError
    ├── ConfigError            a key, value or combination in the run file cannot work
    ├── ModelError             a model folder, checkpoint or chat template cannot be used
    │   └── TemplateError      the chat template is not append-only or cannot render what is asked
    │       └── TailMismatch   new messages cannot be rendered behind stored tokens; render the whole conversation
    ├── RequestError           what a client sent to a server of ours cannot be served (HTTP 4xx)
    │   ├── ContextLengthError the prompt does not fit the model's context
    │   ├── UnknownKeyError    nobody has this key (HTTP 401)
    │   └── SealedRolloutError the rollout has ended; nothing more is recorded (HTTP 409)
    ├── EngineError            inference failed (infrastructure: the rollout is masked)
    │   ├── EngineGoneError    its process is gone, and nothing was begun; it may come back
    │   ├── StaleBaseError     published weights are a difference that the engine cannot use; the whole is wanted
    │   └── UnknownWeightsError nobody knows which weights the engine has; they have to be published to it again
    ├── TrainerError           a rank of the trainer died or does not answer; the run goes on from its checkpoint
    ├── ClusterError           the cluster that a run is in cannot be reached any more, or has lost it
    ├── SandboxError           a sandbox could not be made or broke (infrastructure)
    │   ├── CapabilityError    the backend cannot do what the spec asks, said at acquire
    │   ├── SandboxGoneError   it was stopped: by its owner, at the end of its lifetime, with its lease or its backend
    │   ├── ImageError         an image is not there, or its source, recipe or a step of it cannot be used
    │   └── SandboxBusyError   there is no room for another one now; try again after `retry_after_s`
    ├── AgentError             the agent crashed, hung or broke the protocol
    ├── DeadlineError          a wait ran past its deadline; the message names what it waited for
    ├── StoreError             the trajectory store or a checkpoint could not be written or read
    ├── RunError               nothing that a run collects can be judged; it stops
    └── LedgerError            sampled tokens are unaccounted for; training stops

Messages for users name what was given and what to do. Infrastructure errors never become a reward (DESIGN law 6).
"""

from __future__ import annotations


class UpspiralError(Exception):
    """Base of all of them."""


class ConfigError(UpspiralError, ValueError):
    """A key, value or combination in the run file cannot work."""


class ModelError(UpspiralError, ValueError):
    """A model folder, checkpoint or chat template cannot be used."""


class TemplateError(ModelError):
    """The chat template is not append-only or cannot render what is asked."""


class TailMismatch(TemplateError):
    """New messages cannot be rendered behind stored tokens, only with the whole conversation."""


class RequestError(UpspiralError, ValueError):
    """What a client sent to one of our servers cannot be served. `status` is the HTTP status, `code` a stable name."""

    status = 400
    code = "invalid_request"


class ContextLengthError(RequestError):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class UnknownKeyError(RequestError):
    """No rollout, or no tenant, has this key."""

    status = 401
    code = "invalid_api_key"


class SealedRolloutError(RequestError):
    """The rollout has ended; nothing more is recorded."""

    status = 409
    code = "rollout_sealed"


class EngineError(UpspiralError, RuntimeError):
    """Inference failed. Infrastructure: the rollout is masked, never rewarded."""


class EngineGoneError(EngineError):
    """The engine's process is gone, and nothing of the call was begun. It may come back."""


class StaleBaseError(EngineError):
    """Published weights are a difference that the engine cannot use: to a version that it does not have, or damaged.
    Publish them whole."""


class UnknownWeightsError(EngineError):
    """Nobody knows which weights the engine has: somebody else started it again, or it failed to adopt some. Publish to
    it again."""


class TrainerError(UpspiralError, RuntimeError):
    """A rank of the trainer died or does not answer. What the last checkpoint holds is safe."""


class ClusterError(UpspiralError, RuntimeError):
    """The cluster that a run is in cannot be reached any more, or has lost it. What the run had committed is safe."""


class SandboxError(UpspiralError, RuntimeError):
    """A sandbox could not be made or broke. Infrastructure: the rollout is masked, never rewarded."""


class CapabilityError(SandboxError):
    """The sandbox backend cannot do what the spec asks."""


class SandboxGoneError(SandboxError):
    """The sandbox was stopped: by its owner, at the end of its lifetime, with its lease or with its backend."""


class ImageError(SandboxError):
    """An image is not there, or its source, recipe or a step of it cannot be used."""


class SandboxBusyError(SandboxError):
    """There is no room for another sandbox now."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PageError(UpspiralError, RuntimeError):
    """A page in a sandbox's browser cannot be loaded, or its JavaScript failed. Browser and sandbox are fine."""


class AgentError(UpspiralError, RuntimeError):
    """The agent crashed, hung or broke the protocol."""


class DeadlineError(UpspiralError, TimeoutError):
    """A wait ran past its deadline. The message names what it waited for."""


class StoreError(UpspiralError, OSError):
    """The trajectory store or a checkpoint could not be written or read."""


class RunError(UpspiralError, RuntimeError):
    """Nothing that a run collects can be judged: it stops instead of burning steps."""


class LedgerError(UpspiralError, RuntimeError):
    """Sampled tokens are unaccounted for."""
