"""Exception types that callers may catch.

Every error raised for bad input derives from `JChameleonError` and from the builtin
that fits it (`ValueError`, `LookupError`, ...). Messages are one line and name the
field, the value and the rule.
"""


class JChameleonError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(JChameleonError, ValueError):
    """A configuration value or file is wrong."""


class ModelLoadError(JChameleonError, ValueError):
    """Model weights, tokenizer or template cannot be loaded."""


class ModelSaveError(JChameleonError, RuntimeError):
    """A model cannot be written; what was there before is as it was."""


class UnknownModelError(JChameleonError, LookupError):
    """No preset and no directory or file goes by this model name."""


class ModelFetchError(JChameleonError, RuntimeError):
    """A preset's weights could not be fetched; the message says what to do."""


class AdapterError(JChameleonError, ValueError):
    """An adapter cannot be applied exactly as PEFT would, so it is refused."""


class AdapterReadError(AdapterError):
    """An adapter's files cannot be read now, as on an I/O error; they may be later."""


class AdapterContentError(AdapterError):
    """An adapter's files hold other content than the caller expects."""


class AdapterConflictError(AdapterError):
    """A name is taken by an adapter with other content."""


class UnknownAdapterError(JChameleonError, LookupError):
    """No adapter is registered under this name."""


class AdapterDrainingError(UnknownAdapterError):
    """A name was unregistered, and requests accepted before still run under it."""


class AdapterBusyError(JChameleonError, TimeoutError):
    """An adapter that is being unregistered is still in use; says by what."""


class InvalidRequestError(JChameleonError, ValueError):
    """A prompt or a sampling value is outside what the model or engine allows."""


class DuplicateRequestError(InvalidRequestError):
    """A request of this id is in flight."""


class CapacityError(InvalidRequestError):
    """A request can never fit in the pool, however idle the engine is."""


class QueueFullError(JChameleonError, RuntimeError):
    """As many requests wait as the engine allows; try again later."""


class RequestFailedError(JChameleonError, RuntimeError):
    """One request failed while others went on; the message says why."""


class EngineDeadError(JChameleonError, RuntimeError):
    """The engine thread ended; no request can be answered any more."""


class PolicyError(JChameleonError, RuntimeError):
    """A policy raised or answered nonsense; the message names it."""


class SimulationError(JChameleonError, RuntimeError):
    """A simulated run cannot go on; the message says what holds it up."""


class BatchError(JChameleonError, ValueError):
    """A batch's input or output cannot be used as it is; nothing has run."""


class BatchStoppedError(JChameleonError, RuntimeError):
    """A batch ended before all its lines had rows; those that are there are whole."""
