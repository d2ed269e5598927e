"""A picture to a video: the first latent frame is given.

Either as channels, for a network widened for them (`first_frame_channels`: inpainting in time), or
in its place, clean among noisy frames, for a network trained on such states (`put_first_frame`)
and sampled as a `FirstFrameDenoiser`.

Shapes: B batch, C channels, T frames, H x W grid; the latent is (B, C, T, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_core.conditioning.inpainting import inpainting_channels
from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import Process, batch_time
from ldm_core.errors import UserError


def first_frame_channels(frame: Tensor, frames: int) -> Tensor:
    """(B, C, 1, H, W) -> (B, C + 1, T, H, W): the frame and zeros, then 1 and zeros."""
    later = (0, 0, 0, 0, 0, frames - 1)
    return inpainting_channels(F.pad(frame, later), F.pad(torch.ones_like(frame[:, :1]), later))


def put_first_frame(x_t: Tensor, frame: Tensor) -> Tensor:
    """The clean frame at the head of noisy ones, (B, C, T, H, W).

    In training, the loss of the first frame is left out.

    Raises:
        ValueError: the frame is not (B, C, 1, H, W).
    """
    expected = (*x_t.shape[:2], 1, *x_t.shape[3:])
    if frame.shape != expected:
        raise ValueError(
            f"a video latent of {tuple(x_t.shape)} has a first frame of {expected}, "
            f"got {tuple(frame.shape)}"
        )
    return torch.cat([frame, x_t[:, :, 1:]], dim=2)


class FirstFrameDenoiser:
    """A denoiser that is shown its first frame and answers with it.

    A sampler moves the first frame as one whose x0 is known and ends in it up to its own error,
    which a straight process does not have; `put_first_frame` makes up for the rest.

    It goes around guidance, which may double the batch of what is inside it:
    `FirstFrameDenoiser(ClassifierFreeGuidance(denoiser, ...), frame)`.
    """

    def __init__(self, denoiser: DenoiserLike, frame: Tensor) -> None:
        """`frame` (B, C, 1, H, W)."""
        self.denoiser, self.frame = denoiser, frame

    @property
    def process(self) -> Process:
        """The wrapped denoiser's."""
        return self.denoiser.process

    def denoise(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """x0, the first frame being the given one: (B, C, T, H, W)."""
        return put_first_frame(self.denoiser.denoise(self._seen(x_t), t, cond), self.frame)

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """dx_t/dt for the same x0, at t > 0."""
        later = self.denoiser.velocity(self._seen(x_t), t, cond)
        known = convert(
            self.frame, x_t[:, :, :1], batch_time(t, x_t), self.process,
            Prediction.X0, Prediction.VELOCITY,
        )  # fmt: skip
        return put_first_frame(later, known)

    def _seen(self, x_t: Tensor) -> Tensor:
        """The state with the clean frame.

        Raises:
            UserError: another batch, as of guidance around this denoiser.
        """
        if len(x_t) != len(self.frame):
            raise UserError(
                f"{len(self.frame)} first frames for a batch of {len(x_t)}: guidance doubles the "
                "batch of what is inside it, so put the frames around it, "
                "FirstFrameDenoiser(ClassifierFreeGuidance(denoiser, ...), frame)"
            )
        return put_first_frame(x_t, self.frame)
