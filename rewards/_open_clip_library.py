"""Models of the open_clip library: loading them, and pictures as its own transforms of PIL images show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffalign.listing import nearest
from diffalign.rewards._clip import REMEMBERED
from diffalign.rewards._hub import TEXT, Checkpoint
from diffalign.rewards._loading import Dtype, torch_dtype
from diffalign.rewards._preprocess import Method, normalise, resize, shortest, unit
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HUB, FOLDER = "hf-hub:", "local-dir:"  # how open_clip writes models that bring their own weights
NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # of weights, in the library's order


@dataclass(frozen=True)
class OpenClip:
    model: Any
    tokens: Any  # prompts -> ids
    scale: float  # exp(logit_scale), read in fp32: bf16 would be off by 1 %
    dtype: torch.dtype
    device: torch.device | str
    look: Mapping[str, Any]  # the model's preprocess_cfg
    known: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> unit vectors [B, D] fp32, with gradients."""
        import torch.nn.functional as F

        pixels = normalise(view(images, self.look), self.look["mean"], self.look["std"])
        return F.normalize(self.model.encode_image(pixels.to(self.dtype)).float(), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D] fp32; new prompts are encoded once."""
        import torch
        import torch.nn.functional as F

        if new := [p for p in dict.fromkeys(prompts) if p not in self.known]:
            with torch.no_grad():
                vectors = F.normalize(self.model.encode_text(self.tokens(new).to(self.device)).float(), dim=-1)
            self.known.update(zip(new, vectors, strict=True))
        found = torch.stack([self.known[p] for p in prompts])
        while len(self.known) > REMEMBERED:
            del self.known[next(iter(self.known))]
        return found


def library() -> ModuleType:
    """The module open_clip. Raises UserError when it cannot be imported."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"reward 'openclip' needs open_clip ({error}): pip install 'diffalign[openclip]'") from error
    except RuntimeError as error:  # the operators of a torchvision that was built for another torch
        raise UserError(f"torchvision does not fit this torch ({error}); install the one built for it") from error
    module: ModuleType = open_clip
    return module


def sources(name: str, pretrained: str | None, revision: str | None) -> list[Checkpoint]:
    """Where the weights may be, in order; the last pattern of each names their file."""
    if pretrained is None:
        repository = name.removeprefix(HUB).removeprefix(FOLDER)
        return [Checkpoint(repository, revision, (*TEXT, file)) for file in NAMES]
    if Path(pretrained).expanduser().is_file():
        return [Checkpoint(pretrained)]
    repository, _, file = tagged(name, pretrained)["hf_hub"].rpartition("/")
    return [Checkpoint(repository, None, (f,)) for f in ((file,) if file else NAMES)]


def tagged(name: str, pretrained: str) -> dict[str, Any]:
    """What open_clip's list says of the tag `pretrained` of the model `name`; UserError for what is not in it."""
    open_clip = library()
    from open_clip.pretrained import get_pretrained_cfg

    if name not in open_clip.list_models():
        raise UserError(f"open_clip knows no model '{name}'; {nearest(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        raise UserError(f"'{pretrained}' is no file, and no weights of {name}; {nearest(pretrained, tags)}")
    found: dict[str, Any] = get_pretrained_cfg(name, pretrained)
    return found


def load(
    name: str,
    pretrained: str | None,
    revision: str | None,
    dtype: Dtype,
    device: torch.device | str,
    local_files_only: bool,
) -> OpenClip:
    """A frozen model of open_clip's. Raises UserError when the library or the checkpoint cannot be had."""
    open_clip = library()
    tag: dict[str, Any] = {}
    if name.startswith(HUB):
        name = f"{FOLDER}{_fetched(sources(name, None, revision), local_files_only).parent}"
    elif pretrained is not None and Path(pretrained).expanduser().is_file():
        pretrained = str(Path(pretrained).expanduser())
    elif pretrained is not None:
        tag = tagged(name, pretrained)
        pretrained = str(_fetched(sources(name, pretrained, None), local_files_only))
    try:
        model = open_clip.create_model(
            name,
            pretrained,
            force_quick_gelu=tag.get("quick_gelu", False),
            force_preprocess_cfg=tag,
            require_pretrained=True,
        )
        tokens = open_clip.get_tokenizer(name)
    except Exception as error:  # many kinds: an unknown model, files that are absent, cut short or of another model
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"open_clip cannot load '{name}' ({said}); give weights that were made for it") from error
    scale, chosen = float(model.logit_scale.detach().exp()), torch_dtype(dtype)
    model = model.to(device, chosen).eval().requires_grad_(False)
    return OpenClip(model, tokens, scale, chosen, device, model.visual.preprocess_cfg)


def view(x: Tensor, look: Mapping[str, Any]) -> Tensor:
    """[B, 3, H, W] -> [B, 3, *size] in [0, 1], by the rules of open_clip's transforms.

    shortest: the sides reach the size, the middle is cut out; longest: the whole fits, with borders of `fill_color`;
    squash: both sides are brought to the size, the width first, as by Pillow before 13; later ones begin with the
    height of tall pictures, for a few grey levels of difference at sharp edges.
    """
    import torch.nn.functional as F

    size: tuple[int, int] = (look["size"],) * 2 if isinstance(look["size"], int) else tuple(look["size"])
    method: Method = "bilinear" if look["interpolation"] == "bilinear" else "bicubic"
    old, new = (x.shape[2], x.shape[3]), size
    ratios = [n / wanted for n, wanted in zip(old, size, strict=True)]
    if look["resize_mode"] == "longest":
        new = (round(old[0] / max(ratios)), round(old[1] / max(ratios)))
    elif look["resize_mode"] == "shortest" and size[0] == size[1]:
        new = shortest(*old, size[0])
    elif look["resize_mode"] == "shortest":
        new, method = (round(old[0] / min(ratios)), round(old[1] / min(ratios))), "bicubic"
    x = resize(unit(x), new, method)
    edges = []
    for wanted, n in reversed(list(zip(size, new, strict=True))):  # F.pad begins with the last dimension
        before = (wanted - n) // 2 if wanted > n else -round((n - wanted) / 2)
        edges += [before, wanted - n - before]
    return F.pad(x, edges, value=look["fill_color"] / 255)


def _fetched(places: Sequence[Checkpoint], local_files_only: bool) -> Path:
    """The first file of weights that is there."""
    for place in places:
        path = Path(place.folder(local_files_only), place.only[-1])
        if path.is_file():
            return path
    names = " or ".join(place.only[-1] for place in places)
    raise UserError(f"'{places[0].model}' holds no {names}; give a repository with weights in open_clip's format")
