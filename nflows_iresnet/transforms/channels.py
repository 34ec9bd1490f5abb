"""Features, or the channels of images, as the columns of rows."""

from __future__ import annotations

from torch import Tensor

from nflows_iresnet.validation import require_tensor


def require_channels(inputs: Tensor, features: int) -> None:
    """Refuse what is neither features (B, F) nor images (B, F, H, W) with F channels."""
    require_tensor("inputs", inputs)
    if inputs.dim() in (2, 4) and inputs.shape[1] == features:
        return
    vectors, images = f"(batch, {features})", f"(batch, {features}, height, width)"
    kinds = {2: vectors, 4: images}
    expected = kinds.get(inputs.dim(), f"{vectors}, or {images} for images")
    raise ValueError(f"expected inputs of shape {expected}, got {tuple(inputs.shape)}")


def as_rows(inputs: Tensor) -> Tensor:
    """Return features (B, F), or the channels of images (B, F, H, W), as rows (N, F)."""
    return inputs if inputs.dim() == 2 else inputs.movedim(1, -1).reshape(-1, inputs.shape[1])


def like_inputs(rows: Tensor, inputs: Tensor) -> Tensor:
    """Return rows (N, F) in the shape of the inputs that they were made of."""
    if inputs.dim() == 2:
        return rows.contiguous()
    batch, features, *size = inputs.shape
    return rows.reshape(batch, *size, features).movedim(-1, 1).contiguous()


def for_each_input(logabsdet: Tensor, inputs: Tensor) -> Tensor:
    """Return the sum over each of the inputs where every row has this log-determinant, (B,)."""
    pixels = inputs.shape[2:].numel()
    return (logabsdet if pixels == 1 else pixels * logabsdet).expand(inputs.shape[0])


def sum_of_each(logabsdets: Tensor, inputs: Tensor) -> Tensor:
    """Return the sum of the log-determinants of rows (N,) over each of the inputs, shape (B,)."""
    if inputs.dim() == 2:
        return logabsdets
    return logabsdets.reshape(inputs.shape[0], inputs.shape[2:].numel()).sum(1)
