"""The function text that MLX 0.32 generates around a kernel body.

Owns the rules of MLX's `metal_kernel` (its mlx/backend/common/metal_kernel.cpp): which inputs are `constant`, which
shape parameters and thread attributes appear, how template values are written. The emulator's tests compare the text
with what MLX itself prints. Leaves out compiling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Inputs with fewer elements than this are passed in the constant address space.
CONSTANT_BELOW = 8

METAL_TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "float16_t",
    "float32": "float",
    "bfloat16": "bfloat16_t",
}

# In MLX's order, which is that of the parameters.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

TemplateValue = int | bool | str
"""A template argument: a number, a truth value, or the name of a dtype such as "float16"."""


@dataclass(frozen=True)
class InputType:
    """All of an input that the signature depends on, so that one text is compiled once, whatever its inputs' shapes."""

    dtype: str
    is_scalar: bool
    is_constant: bool

    @classmethod
    def of(cls, dtype: str, ndim: int, num_elements: int) -> "InputType":
        return cls(dtype, ndim == 0, num_elements < CONSTANT_BELOW)


@dataclass(frozen=True)
class KernelText:
    """One kernel as given to `metal_kernel`, with what its call adds to the signature."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    atomic_outputs: bool
    inputs: tuple[InputType, ...]
    output_dtypes: tuple[str, ...]
    template: tuple[tuple[str, TemplateValue], ...]

    def attributes(self) -> list[str]:
        """Thread attributes that the body mentions; MLX looks into `source` only, never into `header`."""
        return [name for name in ATTRIBUTES if name in self.source]

    def function_name(self) -> str:
        name = "custom_kernel_" + self.name
        if self.template:
            written = template_arguments(self.template)
            for unwanted in (", ", "<", ">", "-"):
                written = written.replace(unwanted, "_")
            name += "_" + written[:-1]
        for given in self.inputs:
            mark = "s" if given.is_scalar else "c" if given.is_constant else ""
            name += f"_{METAL_TYPES[given.dtype]}{mark}"
        return name + "".join(f"_{METAL_TYPES[dtype]}" for dtype in self.output_dtypes)

    def shape_parameters(self, index: int) -> list[tuple[str, str]]:
        """(suffix, parameter type) of what follows input `index` in the signature; nothing for 0-d inputs."""
        if self.inputs[index].is_scalar:
            return []
        name = self.input_names[index]
        kinds = {"shape": "int*", "strides": "int64_t*", "ndim": "int&"}
        return [(s, f"const constant {kind}") for s, kind in kinds.items() if f"{name}_{s}" in self.source]

    def parameters(self) -> list[str]:
        """The buffer parameters, in order and without `[[buffer(i)]]`."""
        found = []
        for index, (name, given) in enumerate(zip(self.input_names, self.inputs, strict=True)):
            space = "constant" if given.is_constant else "device"
            found.append(f"const {space} {METAL_TYPES[given.dtype]}{'&' if given.is_scalar else '*'} {name}")
            found += [f"{kind} {name}_{suffix}" for suffix, kind in self.shape_parameters(index)]
        for name, dtype in zip(self.output_names, self.output_dtypes, strict=True):
            kind = f"atomic<{METAL_TYPES[dtype]}>" if self.atomic_outputs else METAL_TYPES[dtype]
            found.append(f"device {kind}* {name}")
        return found

    def full_source(self) -> str:
        """What MLX hands to Metal's compiler, behind its own utilities."""
        text = self.header
        if self.template:
            text += "template <" + ", ".join(f"{_kind(value)} {name}" for name, value in self.template) + ">\n"
        parameters = [f"  {written} [[buffer({index})]]" for index, written in enumerate(self.parameters())]
        parameters += [f"  {ATTRIBUTES[name]} {name} [[{name}]]" for name in self.attributes()]
        text += f"[[kernel]] void {self.function_name()}(\n" + ",\n".join(parameters) + ") {\n" + self.source + "\n}\n"
        if self.template:
            instance = self.function_name() + template_arguments(self.template)
            text += f'\ntemplate [[host_name("{self.function_name()}")]] [[kernel]] decltype({instance}) {instance};\n'
        return text


def template_arguments(template: Sequence[tuple[str, TemplateValue]]) -> str:
    """Such as `<float16_t, 4, 1>`."""
    return "<" + ", ".join(_written(value) for _, value in template) + ">"


def _kind(value: TemplateValue) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def _written(value: TemplateValue) -> str:
    return METAL_TYPES[value] if isinstance(value, str) else str(int(value))
