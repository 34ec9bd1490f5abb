"""Settings that change a function without changing the shapes of its weights, in the state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAVED_WITH = "was saved with"
"""In the message about weights of other settings."""


class SettingsInState(nn.Module):
    """A module whose `state_dict` remembers the settings that its weights were trained with.

    Weights of a network with `coeff=0.97` are other weights in one with `coeff=0.5`: the same
    names and shapes, another density. The state therefore carries `settings()`, and to load it
    into a module with others is refused. States without them (older ones, or a dictionary of
    parameters alone) load as before.
    """

    def settings(self) -> Mapping[str, object]:
        """Return what the function depends on beside its weights; values are compared by `repr`."""
        raise NotImplementedError

    def adopt(self, saved: Mapping[str, str]) -> None:
        """Take over settings that were left open when the module was built; none by default.

        Args:
            saved: the settings in a state that is about to be loaded, by `repr`.
        """

    def get_extra_state(self) -> Tensor:
        """Return the settings as the bytes of a JSON text: tensors survive every way of saving."""
        text = json.dumps({name: repr(value) for name, value in self.settings().items()})
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: settings are compared before weights are loaded."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict:
            self.adopt(_decoded(state_dict[key]))
        problem = _difference(state_dict.get(key), self.get_extra_state())
        if problem is not None:
            where = f"{prefix[:-1] or 'the module'} ({type(self).__name__})"
            error_msgs.append(
                f"{where} {SAVED_WITH} {problem}: the weights would be those of another "
                f"function. Build it with the same settings, or delete {key!r} from the state to "
                "load them all the same."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)


def _difference(saved: Tensor | None, present: Tensor) -> str | None:
    """Say which settings differ, or None."""
    if saved is None:
        return None
    then, now = _decoded(saved), _decoded(present)
    return next(
        (
            f"{name}={then[name]}, but has {name}={now[name]}"
            for name in then
            if name in now and then[name] != now[name]
        ),
        None,
    )


def _decoded(state: Tensor) -> dict[str, str]:
    """Return settings by name; none where the bytes are those of no text any more.

    States are averaged by hand, in any precision: a mean of equal settings is them, but for
    rounding, and of others nothing can be told.
    """
    try:
        codes = state.detach().to("cpu", torch.float64).round().to(torch.int64)
        settings: dict[str, str] = json.loads(bytes(codes.tolist()).decode())
    except ValueError:
        return {}
    return settings
