"""`FocusTrainer`: transformers' Trainer, with pushes that are checked, one commit, and silent on this machine."""

from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub.utils import logging
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import HubStrategy

from .cards import CARD_FILE, CardFacts, find_pipeline_tag, model_card
from .errors import FocusConfigError, FocusHubError, bad_value
from .hub import prepare_repo
from .modeling import FocusMixin
from .sharing import push_folder

logger = logging.get_logger(__name__)
_EVALUATED = "eval_"
# Of an evaluation, but of its speed and not of the model
_NO_RESULTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class FocusTrainer(Trainer):
    """`transformers.Trainer` for FocusA models that are pushed to the Hub; in all else the same.

    What it changes: the repository, token and permission are checked when it is made; a push is one commit by
    `push_folder`, without the pickled training arguments (which hold paths of this machine) and without weights of an
    earlier push; the card is FocusA's, with usage, settings and results.

    `hub_strategy="end"` pushes at the end alone, `"every_save"` (the default) also each saved model. Pushing is done
    before training goes on. A push between fails with a warning only: the next one brings everything.

    Raises:
        FocusConfigError: `push_to_hub` with a model without FocusA, or a strategy that uploads whole checkpoints.
        FocusHubError: the Hub would not take the push.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, and check that it can be pushed to. See `prepare_repo`."""
        if not isinstance(self.accelerator.unwrap_model(self.model), FocusMixin):
            raise FocusConfigError(bad_value("model", type(self.model).__name__, "a model with FocusA"))
        if self.args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            accepted = "'end' or 'every_save': a checkpoint's optimizer and arguments are pickles, with paths in them"
            raise FocusConfigError(bad_value("hub_strategy", self.args.hub_strategy.value, accepted))
        if self.is_world_process_zero():
            self.hub_model_id = prepare_repo(
                self.args.hub_model_id or Path(self.args.output_dir).resolve().name,
                private=self.args.hub_private_repo if private is None else private,
                revision=self.args.hub_revision,
                token=token or self.args.hub_token,
            )
            self.push_in_progress = None

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
        **others: Any,
    ) -> None:
        """Write `README.md` of this run into `args.output_dir`.

        Args:
            language, license, tags: as the Hub writes them.
            model_name: title. Default: the repository's, or the folder's name.
            finetuned_from: id of the base model on the Hub. Default: where the model was loaded from, if that is one.
            dataset: id of the training data on the Hub.
            others: taken for the sake of Trainer's signature, and not used.

        Raises:
            FocusConfigError: metadata that the Hub would refuse.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        architecture = type(model).__name__.removeprefix("Focus")
        evaluated = next((line for line in reversed(self.state.log_history) if f"{_EVALUATED}loss" in line), {})
        metrics = {
            name.removeprefix(_EVALUATED): value
            for name, value in evaluated.items()
            if name.startswith(_EVALUATED) and name.removeprefix(_EVALUATED) not in _NO_RESULTS and isfinite(value)
        }
        card = model_card(
            CardFacts(
                name=model_name or (self.hub_model_id or str(Path(self.args.output_dir).resolve())).rpartition("/")[2],
                pipeline_tag=find_pipeline_tag(architecture),
                base_model=finetuned_from or model.config.name_or_path,
                license=license,
                language=[language] if isinstance(language, str) else language,
                dataset=dataset,
                metrics=metrics,
                focus=model.focus_config.to_dict() if isinstance(model, FocusMixin) else None,
                training={"steps": self.state.global_step, **extract_hyperparameters_from_trainer(self)},
                tags=[tags] if isinstance(tags, str) else tags or (),
                auto_class=getattr(type(model), "_auto_class", None),
                has_code=bool(getattr(model.config, "auto_map", None)),
            )
        )
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        card.save(Path(self.args.output_dir) / CARD_FILE)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """Save the model and push it. Every process has to call it; the first one pushes.

        Args:
            commit_message: of the commit.
            blocking: only True: a push in the background could read what training writes.
            token, revision, private: as in `push_folder`. Default: those of the training arguments.
            card: see `create_model_card`.

        Returns:
            the commit, on the first process.

        Raises:
            FocusError: see `push_folder`. The model is saved.
        """
        if not blocking:
            raise FocusConfigError(bad_value("blocking", blocking, "True"))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        return self._push(self.args.output_dir, commit_message, token, revision)

    def _push(
        self, folder: str, commit_message: str | None, token: str | None = None, revision: str | None = None
    ) -> CommitInfo:
        return push_folder(
            folder,
            self.hub_model_id,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        except FocusHubError as error:
            logger.warning(f"The checkpoint was not pushed; training goes on. {error}")
