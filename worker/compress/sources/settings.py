"""What adapter_config.json says of a LoRA adapter; whatever cannot be merged is refused by name.

PEFT adds keys with every release. Those that mean nothing for a merge are listed here, and any
other one must be unset: a kind of adapter that is not known yet is not taken for plain LoRA.
"""

import json
import math
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import CheckpointError

SETTINGS = "adapter_config.json"
_IRRELEVANT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "megatron_core", "megatron_config", "eva_config"),
    *("qalora_group_size", "runtime_config", "modules_to_save"),
}
"""How the adapter was trained, or told by its tensors (`modules_to_save`)."""
_INITIAL = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin that leave the base as it was; others, such as pissa, trained on a changed one."""


class AdapterSettings(BaseModel):
    """The part of adapter_config.json that a merge depends on."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str = True
    bias: Literal["none"] = "none"
    ensure_weight_tying: bool = False

    def rank(self, module: str) -> int:
        """Of the module of such a name in the model that was trained."""
        return int(_patterned(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank(module)
        alpha = _patterned(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(folder: Path) -> AdapterSettings:
    """Raises CheckpointError if there are none, or the adapter is of a kind that is not merged."""
    path = folder / SETTINGS
    try:
        settings = AdapterSettings.model_validate(json.loads(path.read_text(encoding="utf-8")))
        for pattern in {**(settings.rank_pattern or {}), **(settings.alpha_pattern or {})}:
            re.compile(pattern)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: name the folder of a PEFT adapter, with {SETTINGS} and "
            "adapter_model.safetensors"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise CheckpointError(
            f"{path}: {place}: {first['msg']}; only plain LoRA can be merged"
        ) from error
    except (OSError, ValueError, RecursionError, re.error) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): save it again") from error
    if settings.init_lora_weights not in _INITIAL:
        raise CheckpointError(
            f"{path}: init_lora_weights: {settings.init_lora_weights!r} trains on changed base "
            "weights; convert the adapter to plain LoRA when saving it"
        )
    unknown = settings.model_extra or {}
    if kinds := sorted(key for key, value in unknown.items() if value and key not in _IRRELEVANT):
        raise CheckpointError(
            f"{path}: {kinds[0]} is set, which cannot be merged: merge the adapter with PEFT, and "
            "compress what it saves"
        )
    return settings


def _patterned(
    patterns: dict[str, float] | dict[str, int] | None, module: str, own: float
) -> float:
    """The value of the first pattern that fits the end of a module's name, else `own`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return own
