"""The model to train: loaded, patched with FocusA, frozen, given LoRA, and its parameters sorted into groups."""

import re
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .arguments import ModelArguments, TrainArguments
from .configuration import FocusConfig
from .discovery import architecture_of
from .errors import FocusConfigError, FocusError, bad_value
from .modeling import FocusMixin
from .patching import apply_focus
from .sites import find_sites
from .task_types import Source, Task

DEFAULT_BLOCK_SIZE = 512
FOCUS_PARAMETER = re.compile(r"(^|\.)focus\.")
# Scales, offsets, and FocusA's gates and predictor: pulling them to zero is no regularisation
NO_DECAY = re.compile(r"bias|norm|gain|\.focus\.(predictor|span|readout|mix)", re.IGNORECASE)


def check_model_arguments(args: ModelArguments, given: PreTrainedModel | None) -> None:
    """Refuse combinations that contradict each other.

    Raises:
        FocusConfigError: no model, or settings that leave nothing to train or exclude each other.
    """
    if given is None and args.model_name_or_path is None:
        raise FocusConfigError(bad_value("model_name_or_path", None, "a model id or folder"))
    if given is not None and args.from_scratch:
        raise FocusConfigError(bad_value("from_scratch", True, "False where a model object is given"))
    if args.freeze_base and not args.focus:
        raise FocusConfigError(bad_value("freeze_base", True, "False with --no-focus: nothing would be trained"))
    if args.freeze_base and args.lora_rank:
        raise FocusConfigError(bad_value("lora_rank", args.lora_rank, "0 with --freeze-base: LoRA changes the base"))
    if args.lora_rank and find_spec("peft") is None:
        raise FocusConfigError(bad_value("lora_rank", args.lora_rank, "0, or peft installed (pip install peft)"))


def check_objective(train_args: TrainArguments, args: ModelArguments, focus: FocusConfig, source: Source) -> None:
    """Refuse to match where there is nothing to match, or what is matched would move.

    Raises:
        FocusConfigError: see above.
    """
    if train_args.objective != "match":
        return
    carried = getattr(source.config, "focus_config", None)
    settings = focus if carried is None else FocusConfig.from_dict(dict(carried))
    if not args.freeze_base:
        accepted = "True with the objective match: the base is what is matched"
        raise FocusConfigError(bad_value("freeze_base", False, accepted))
    if settings.max_dist is None:
        accepted = "a number with the objective match: without a limit there is nothing to match"
        raise FocusConfigError(bad_value("max_dist", None, accepted))
    if settings.global_rotation < 1:
        accepted = "1.0 with the objective match: the base without its rotation is no teacher"
        raise FocusConfigError(bad_value("global_rotation", settings.global_rotation, accepted))
    if settings.span_penalty:
        # It is added to the task's loss, which is not computed
        raise FocusConfigError(bad_value("span_penalty", settings.span_penalty, "0 with the objective match"))
    if args.gradient_checkpointing:
        raise FocusConfigError(bad_value("gradient_checkpointing", True, "False with the objective match"))
    if train_args.torch_compile:
        raise FocusConfigError(bad_value("torch_compile", True, "False with the objective match"))


def find_source(
    args: ModelArguments,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    needs_features: bool = False,
    splits_words: bool = False,
) -> Source:
    """Config, tokenizer and, if needed, feature extractor of the model that `args` names, or of the objects given.

    A processor given as the tokenizer is both. With `splits_words` a tokenizer that would glue lists of words together
    (RoBERTa's, GPT-2's) is loaded as one that begins each with a space.

    Raises:
        FocusConfigError: they are not found, or a model was given without a tokenizer.
    """
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    if model is not None and tokenizer is None and args.tokenizer is None:
        raise FocusConfigError(bad_value("tokenizer", None, "a tokenizer, where a model object is given"))
    config = (
        model.config
        if model is not None
        else _load(AutoConfig, "model_name_or_path", args.model_name_or_path, options)
    )
    features = getattr(tokenizer, "feature_extractor", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if needs_features and features is None:
        if model is not None:
            accepted = "a processor, which has a feature extractor too, where a model object that hears is given"
            raise FocusConfigError(bad_value("tokenizer", type(tokenizer).__name__, accepted))
        features = _load(AutoFeatureExtractor, "model_name_or_path", args.model_name_or_path, options)
    if tokenizer is None:
        place = ("tokenizer", args.tokenizer) if args.tokenizer else ("model_name_or_path", args.model_name_or_path)
        if args.tokenizer:
            options = {"trust_remote_code": args.trust_remote_code}
        tokenizer = _load(AutoTokenizer, *place, options)
        if splits_words and not _reads_words_as_text(tokenizer):
            spaced = _load(AutoTokenizer, *place, {**options, "add_prefix_space": True})
            tokenizer = spaced if _reads_words_as_text(spaced) else tokenizer
    if tokenizer.pad_token_id is None:
        # Padding is masked out: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise FocusConfigError(bad_value("tokenizer", type(tokenizer).__name__, "one with a PAD or EOS token"))
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise FocusConfigError(
            bad_value(
                "tokenizer", f"{len(tokenizer)} tokens", f"at most the {vocabulary} tokens that the model embeds"
            )
        )
    return Source(config, tokenizer, model, features=features if needs_features else None)


def _reads_words_as_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    # The first word may begin otherwise, as any text does
    text, words = tokenizer("a a a"), tokenizer(["a", "a", "a"], is_split_into_words=True)
    return text["input_ids"][1:] == words["input_ids"][1:]


def find_block_size(asked: int | None, source: Source) -> int:
    """Tokens in an example: what was asked for, within the model's limit.

    Raises:
        FocusConfigError: more was asked for than the model's positions.
    """
    limits = (
        getattr(source.config.get_text_config(), "max_position_embeddings", None),
        getattr(source.config, "max_target_positions", None),
        source.tokenizer.model_max_length,
    )
    limit = min((value for value in limits if isinstance(value, int) and value > 0), default=DEFAULT_BLOCK_SIZE)
    if asked is None:
        return min(limit, DEFAULT_BLOCK_SIZE)
    if asked > limit:
        raise FocusConfigError(bad_value("block_size", asked, f"at most {limit}, the model's positions"))
    return asked


def check_focus_settings(args: ModelArguments, focus: FocusConfig, source: Source) -> None:
    """Refuse settings that a model which already carries FocusA cannot take.

    Raises:
        FocusConfigError: --no-focus, or settings other than the model's and the defaults.
    """
    carried = getattr(source.config, "focus_config", None)
    if carried is None:
        return
    if not args.focus:
        raise FocusConfigError(
            bad_value("focus", False, "True for a model that carries FocusA; remove_focus takes it off")
        )
    carried = FocusConfig.from_dict(dict(carried))
    default = FocusConfig()
    for item in fields(FocusConfig):
        asked = getattr(focus, item.name)
        if asked not in (getattr(default, item.name), getattr(carried, item.name)):
            accepted = f"{getattr(carried, item.name)!r}: the model was patched with it already"
            raise FocusConfigError(bad_value(item.name, asked, accepted))


def load_model(source: Source, task: Task, args: ModelArguments, config: dict[str, Any]) -> PreTrainedModel:
    """The weights, of the task's Auto class, in `args.dtype`; `config` replaces settings of the model's config.

    Raises:
        FocusConfigError: the model is not found, or has no class for the task.
    """
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "dtype": getattr(torch, args.dtype)}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    if source.model is None:
        for name, value in config.items():
            setattr(source.config, name, value)
        try:
            if args.from_scratch:
                source.model = task.auto_class.from_config(source.config, **options)
            else:
                source.model, info = task.auto_class.from_pretrained(
                    args.model_name_or_path,
                    config=source.config,
                    revision=args.revision,
                    output_loading_info=True,
                    ignore_mismatched_sizes=bool(config),
                    **options,
                )
                source.new_parameters = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
        except (OSError, ValueError) as error:
            accepted = f"a model with a class for {task.name} ({str(error).strip().partition(chr(10))[0]})"
            raise FocusConfigError(bad_value("model_name_or_path", args.model_name_or_path, accepted)) from error
    else:
        labels = config.get("num_labels")
        if labels is not None and source.config.num_labels != labels:
            raise FocusConfigError(
                bad_value("model", f"{source.config.num_labels} labels", f"{labels} labels, as the data")
            )
    if task.name == "causal-lm":
        check_causal(source.model)
    return source.model


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Whether tokens of a language model see only those before them: else each would see what it is to predict.

    Raises:
        FocusConfigError: they see later ones, as in a BERT.
    """
    try:
        sites = find_sites(model, architecture_of(model))
    except FocusError:
        # Nothing is known of its attention; it cannot be patched either
        return
    if any(site.is_causal for site in sites):
        return
    ids = torch.arange(16, device=model.device).view(2, 8) % model.config.get_text_config().vocab_size
    ids[1, 0] = ids[0, 0]
    was_training = model.training
    one, other = model.eval()(ids).logits[:, 0]
    model.train(was_training)
    # Experts may round otherwise where other tokens are beside
    rounding = torch.finfo(one.dtype).eps ** 0.5
    if (one - other).abs().max() > rounding * one.float().std():
        accepted = f"masked-lm for {type(model).__name__}, whose tokens see later ones"
        raise FocusConfigError(bad_value("task", "causal-lm", accepted))


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Whether the model keeps documents apart that lie in one row, told by positions that begin anew.

    Raises:
        FocusConfigError: it does not.
    """
    size = 4
    first, other, last = torch.arange(3 * size, device=model.device).view(3, 1, size) % model.config.vocab_size
    positions = torch.arange(size, device=model.device)[None]
    was_training = model.training
    model.eval()

    def logits_of_last(*parts: Tensor) -> Tensor:
        places = positions.repeat(1, len(parts))
        return model(torch.cat(parts, dim=1), position_ids=places, use_cache=False).logits[:, -size:].float()

    try:
        alone, after_one, after_other = (logits_of_last(*p) for p in ((last,), (first, last), (other, last)))
        # Whatever the precision, what was in front may not be seen
        kept_apart = torch.equal(after_one, after_other) and torch.allclose(alone, after_one, 0.05, 0.05)
    except TypeError:
        # It takes no positions
        kept_apart = False
    finally:
        model.train(was_training)
    if not kept_apart:
        accepted = f"'joined': {type(model).__name__} does not keep documents in one row apart"
        raise FocusConfigError(bad_value("packing", "separate", accepted))


def is_patched(model: nn.Module) -> bool:
    """Whether the model carries FocusA."""
    return isinstance(model, FocusMixin)


def choose_trained(source: Source, task: Task, args: ModelArguments, focus: FocusConfig, seed: int) -> nn.Module:
    """Patch the model, if it is to be and is not yet, and leave gradients only where `args` wants training.

    Returns:
        the model, wrapped by PEFT with LoRA.

    Raises:
        FocusConfigError, NoMatchingLayerError, UnsupportedArchitectureError: before the model is changed.
    """
    model = source.model
    _check_lora_targets(model, args.lora_targets)
    if args.focus and not is_patched(model):
        apply_focus(model, focus)
    text_config = model.config.get_text_config()
    if task.model_finds_padding and text_config.pad_token_id is None:
        # Only where needed, and after loading: embeddings never train the row of the padding token they are built with
        text_config.pad_token_id = source.tokenizer.pad_token_id
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.freeze_base:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(FOCUS_PARAMETER.search(name)) or name in source.new_parameters)
    if args.lora_rank:
        return _with_lora(model, source, args, seed)
    return model


def _check_lora_targets(model: nn.Module, targets: list[str] | None) -> None:
    names = [name for name, _ in model.named_modules()]
    for target in targets or ():
        if not any(f".{name}".endswith(f".{target}") for name in names):
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise FocusConfigError(bad_value("lora_targets", target, f"names of modules, such as {', '.join(linear)}"))


def _with_lora(model: PreTrainedModel, source: Source, args: ModelArguments, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    new = [name for name in source.new_parameters if not FOCUS_PARAMETER.search(name)]
    heads = sorted({name.rpartition(".")[0] for name in new})
    patched = is_patched(model)
    kept = [*([r"(.*\.)?focus\..*"] if patched else []), *map(re.escape, heads)]
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets or "all-linear",
        exclude_modules="|".join(kept) or None,
        modules_to_save=(["focus"] if patched else []) + heads or None,
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def merge_lora(model: nn.Module) -> PreTrainedModel:
    """The plain model again, LoRA added into its weights; a model without LoRA is returned as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def parameter_groups(model: nn.Module, args: TrainArguments) -> list[dict[str, Any]]:
    """Trained parameters for AdamW: base or FocusA, each with and without weight decay.

    Vectors, biases, norms, gains, FocusA's predictor and its gates get no decay. FocusA's parameters get
    `args.focus_learning_rate`, where it is set.
    """
    rates = {False: args.learning_rate, True: args.focus_learning_rate or args.learning_rate}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not NO_DECAY.search(name)
            groups.setdefault((bool(FOCUS_PARAMETER.search(name)), decays), []).append(parameter)
    if not groups:
        raise FocusConfigError(
            bad_value("model", type(model).__name__, "a model with at least one trainable parameter")
        )
    return [
        {"params": parameters, "lr": rates[focus], "weight_decay": args.weight_decay if decays else 0.0}
        for (focus, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _load(auto_class: type, argument: str, name: str, options: dict[str, Any]) -> Any:
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        accepted = f"an id on the Hub or a folder ({str(error).strip().partition(chr(10))[0]})"
        raise FocusConfigError(bad_value(argument, name, accepted)) from error
