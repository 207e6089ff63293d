"""`quantization_config` of config.json, as compressed-tensors defines it, written and read.

Written with the exact name of every quantized layer, a group of the config for each scheme. Read
only to learn which schemes there are and that nothing else is done to weights or activations: the
tensors themselves tell which of the schemes each has.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import CheckpointError
from ...model.fields import Fields

PACK_QUANTIZED = "pack-quantized"
KEY = "quantization_config"
_REMEDY = (
    "symmetric int4 or int8 in groups of 32, 64 or 128 columns can be taken over as it is. "
    "Of anything else take the unquantized checkpoint and `conclave compress` it"
)

_RULES: dict[str, tuple[object, ...]] = {
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group", None),
    "num_bits": (8, 4),
    "group_size": (32, 64, 128),
    "dynamic": (False, None),
    "actorder": (None, False, "weight", "static"),
}
"""What the keys of a group's `weights` may be; first what a missing one means."""


@dataclass(frozen=True, slots=True, order=True)
class Scheme:
    """Symmetric integers of `bits` (4, 8), with one scale for `group` (32, 64, 128) columns."""

    bits: int
    group: int


def written(layers: Mapping[str, Scheme], plain: Iterable[str]) -> dict[str, object]:
    """The section for quantized `layers` and for linear ones that are `plain`, by module name."""
    return {
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": sorted(plain),
        "config_groups": {
            f"group_{number}": {
                "targets": [name for name, own in layers.items() if own == scheme],
                "format": PACK_QUANTIZED,
                "weights": {
                    "num_bits": scheme.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": scheme.group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, scheme in enumerate(sorted(set(layers.values())))
        },
    }


def read(config: Fields) -> frozenset[Scheme]:
    """The schemes of a config.json; none if it has no such section.

    CheckpointError, which names the key and what to do, for whatever is not as in `Scheme`.
    """
    if config.values.get(KEY) is None:
        return frozenset()
    section = config.section(KEY)
    if section.values.get("quant_method") != "compressed-tensors":
        raise _error(section, "quant_method", "must be 'compressed-tensors'")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if section.values.get(name):
            raise _error(section, name, "must be empty")
    format = section.values.get("format")
    if format not in (PACK_QUANTIZED, "mixed-precision"):
        raise _error(section, "format", f"must be {PACK_QUANTIZED!r}")
    groups = section.section("config_groups")
    return frozenset(_scheme(groups.section(name)) for name in groups.values)


def _scheme(group: Fields) -> Scheme:
    if group.values.get("format", PACK_QUANTIZED) not in (None, PACK_QUANTIZED):
        raise _error(group, "format", f"must be {PACK_QUANTIZED!r}")
    for name in ("input_activations", "output_activations"):
        if group.values.get(name) is not None:
            raise _error(group, name, "must be null")
    weights = group.section("weights")
    for name, allowed in _RULES.items():
        if weights.values.get(name, allowed[0]) not in allowed:
            raise _error(weights, name, f"must be {' or '.join(map(repr, allowed))}")
    return Scheme(weights.integer("num_bits"), weights.integer("group_size"))


def _error(fields: Fields, name: str, rule: str) -> CheckpointError:
    return CheckpointError(f"{fields.error(name, rule)}: {_REMEDY}")
