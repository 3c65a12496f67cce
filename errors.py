"""Every error a user can meet, in one catalogue.

Each class states what is wrong, where in *the user's* model or file, and the remedy.  The command line
prints these three parts and exits with status 2; nothing else is ever shown for bad input.

>>> raise ModelNotFound(path="mdl")
Traceback (most recent call last):
...
tokenmill.errors.ModelNotFound: no model directory at 'mdl'
  remedy: pass a directory with config.json and *.safetensors, or a Hugging Face hub id
"""

from __future__ import annotations

from typing import Any, ClassVar


class TokenmillError(Exception):
    """Base of the catalogue: ``what`` and ``remedy`` are templates over the keyword arguments."""

    what: ClassVar[str] = "{reason}"
    remedy: ClassVar[str] = ""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        self.message = self.what.format(**facts)
        self.advice = self.remedy.format(**facts)
        super().__init__(self.message + (f"\n  remedy: {self.advice}" if self.advice else ""))


# --- the model that comes in ------------------------------------------------------------------------


class ModelNotFound(TokenmillError):
    what = "no model directory at {path!r}"
    remedy = "pass a directory with config.json and *.safetensors, or a Hugging Face hub id"


class DownloadFailed(TokenmillError):
    what = "there is no directory {path!r}, and the hub gave no model of that name: {reason}"
    remedy = (
        "check the name and the network, or download the model elsewhere and pass its directory"
    )


class NotAModel(TokenmillError):
    what = "{path!r} is not a model: {reason}"
    remedy = "pass a directory that holds config.json and *.safetensors"


class NeedsRemoteCode(TokenmillError):
    what = "{path!r} asks to run its own Python code ({reason})"
    remedy = "read that code, then pass --trust-remote-code if you trust it"


class WeightsMissing(TokenmillError):
    what = "{path!r} has a config but its weights are missing: {reason}"
    remedy = (
        "download the *.safetensors files too (all shards named in model.safetensors.index.json)"
    )


class NumbersMissing(TokenmillError):
    what = "the numbers of {name!r} are needed, and there is only a config"
    remedy = "leave out what looks at weights, or compile the checkpoint, without --config-only"


class WeightsDamaged(TokenmillError):
    what = "{file}: {reason}"
    remedy = "the file is truncated or altered: download it again"


class WeightsMismatch(TokenmillError):
    what = "tensor {name!r} does not fit the config: {reason}"
    remedy = "use the config.json that belongs to these weights"


class BadWeight(TokenmillError):
    what = "tensor {name!r} holds {count} NaN or Inf values"
    remedy = "the checkpoint is broken there (a diverged training run, or damage): use another one"


class Unsupported(TokenmillError):
    what = "{reason}\n  where: {where}"
    remedy = "{advice}"


class TokenMixing(TokenmillError):
    what = "{op} mixes tokens outside attention\n  where: {where}"
    remedy = (
        "tokenmill batches tokens of many sequences in one step, which is only right when every other "
        "op treats each token alone: express this as attention, or leave it out"
    )


class MissingExtra(TokenmillError):
    what = "{package} is needed for {purpose} and is not installed"
    remedy = "pip install 'tokenmill[{extra}]'"


# --- the compile itself -----------------------------------------------------------------------------


class BadRecipe(TokenmillError):
    what = "recipe {where}: {reason}"
    remedy = "{advice}"


class BudgetTooSmall(TokenmillError):
    what = (
        "a memory of {budget:,} bytes is too small: weights and the cache of {context:,} tokens need "
        "{needed:,} at the least ({parts})"
    )
    remedy = "{advice}"


class LossTooHigh(TokenmillError):
    what = "the model would lose {loss}, more than the {limit} that may be lost"
    remedy = "{advice}"


class IllegalProgram(TokenmillError):
    what = "after pass {pass_name!r}: {reason}\n  node: {node}"
    remedy = "this is a defect of the pass: run with --check and report what it prints"


class WrongRewrite(TokenmillError):
    what = (
        "pass {pass_name!r} changed what the model computes: relative error {error:.3g} > "
        "{tolerance:.3g}, first at node {node}"
    )
    remedy = "leave this pass out (recipe: disable) and report the model's configuration"


class BadPattern(TokenmillError):
    what = "pattern {name!r}: {reason}\n  where: {where}"
    remedy = "mend its find, put or example; examples/extend/my_pattern.py is one that works"


class BadExtension(TokenmillError):
    what = "extension {name!r}: {reason}"
    remedy = "{advice}"


class WrongFormat(TokenmillError):
    what = "weight {name!r} is stored in {found} and was to be in {wanted}\n  where: {where}"
    remedy = "this is a defect of a pass after quantize: report it with the recipe"


class NotLowered(TokenmillError):
    what = "no lowering for {op} ({where})"
    remedy = "{advice}"


class CompilerMissing(TokenmillError):
    what = "no C++ compiler found ({tried})"
    remedy = "install g++ or clang++, or `pip install ziglang`"


class CrossCompilerMissing(TokenmillError):
    what = "the C++ compiler of this machine cannot build for {machine}"
    remedy = "pip install ziglang, set CXX to a cross compiler, or compile on such a machine"


class BuildFailed(TokenmillError):
    what = "the C++ compiler failed on {file}:\n{log}"
    remedy = "check `tokenmill doctor`; if the compiler is current, report this"


class KernelBuildFailed(BuildFailed):
    what = "Triton failed on {function} in {file} for {target}:\n{log}"
    remedy = (
        "if it cannot write its cache, set TRITON_CACHE_DIR to a directory; else, if `tokenmill doctor` "
        "shows a current Triton, report this"
    )


class KernelTooLarge(TokenmillError):
    what = "kernel {function} needs {need}; {target} has {limit}\n  constants: {constants}"
    remedy = "choose another target, or report this: these tiles do not suit the architecture"


class OutputExists(TokenmillError):
    what = "{path!r} exists already"
    remedy = "choose another directory, or pass --force to replace it"


class OutputForeign(TokenmillError):
    what = "{path!r} is not {kind}, so it will not be replaced"
    remedy = "choose another directory, or remove that one yourself"


class ExportDiffers(TokenmillError):
    what = "the export of {path!r} is not what the artifact is: {reason}"
    remedy = "this is a defect of the export: report it with the recipe; nothing was written"


class OutputFailed(TokenmillError):
    what = "could not write {path!r}: {reason}"
    remedy = "free space or choose another place; nothing half-written was left behind"


# --- the artifact -----------------------------------------------------------------------------------


class NotAnArtifact(TokenmillError):
    what = "{path!r} is not a tokenmill artifact: {reason}"
    remedy = "make one with `tokenmill optimize MODEL -o DIR`"


class ArtifactDamaged(TokenmillError):
    what = "{file}: {reason}"
    remedy = "copy the artifact again or rebuild it with `tokenmill optimize`"


class TokenizerDamaged(TokenmillError):
    what = "{file} is not a tokenizer: {reason}"
    remedy = (
        "download the tokenizer.json of this model again, and compile with it beside config.json"
    )


class ArtifactTooNew(TokenmillError):
    what = "artifact format {found} is newer than this tokenmill understands ({known})"
    remedy = "pip install -U tokenmill"


class ArtifactTooOld(TokenmillError):
    what = "{path!r} was built by tokenmill {built_by}, whose artifacts did not hold {missing} yet"
    remedy = "compile the model again: tokenmill optimize MODEL -o DIR"


class ExtensionMissing(TokenmillError):
    what = "the artifact uses {what}, which is not known here{recorded}"
    remedy = "import the module that registers it first: pass --extension MODULE"


class ForeignTarget(TokenmillError):
    what = "the artifact's kernels ({targets}) do not run here: {reason}"
    remedy = "rebuild on or for this machine: tokenmill optimize MODEL --target {target}"


class NoGpu(TokenmillError):
    what = "no NVIDIA GPU can be used: {reason}"
    remedy = "{advice}"


class OtherKernels(TokenmillError):
    what = "{path!r} was built by tokenmill {built_by}, and this version makes other kernels"
    remedy = "compile the model again: tokenmill optimize MODEL -o DIR"


class DriverTooOld(TokenmillError):
    what = "the NVIDIA driver knows CUDA {found}, and the artifact's kernels need {needed}"
    remedy = "update the driver, or rebuild with a Triton whose ptxas is of CUDA {found}"


class GpuMemoryShort(TokenmillError):
    what = "{name} has {free:.2f} GB free, and {needed:.2f} GB are needed ({parts})"
    remedy = (
        "pass a smaller cache_tokens, free memory that other programs hold, or compile to smaller "
        "weights (--weights int8 or int4)"
    )


class KernelFailed(TokenmillError):
    what = "the kernels of {target} stopped with code {code} between steps {first} and {last}"
    remedy = "check the artifact with `tokenmill verify DIR`; if it is whole, report this"


# --- requests to a session --------------------------------------------------------------------------


class PromptTooLong(TokenmillError):
    what = "the prompt has {tokens} tokens, with {new} to generate, but the model has {limit} positions"
    remedy = "shorten the prompt, or ask for fewer new tokens"


class EmptyPrompt(TokenmillError):
    what = "prompt {index} is empty"
    remedy = "give at least one token; to start from nothing, give the model's begin token as ids"


class BadToken(TokenmillError):
    what = "token id {token} at position {position} is outside the vocabulary of {vocab}"
    remedy = "use the tokenizer that belongs to this model"


class BadRequest(TokenmillError):
    what = "{reason}"
    remedy = "{advice}"


class OutOfCache(TokenmillError):
    what = "{needed} tokens of cache are needed and {available} are there"
    remedy = "open the session with a larger cache_tokens, or send fewer sequences at once"
