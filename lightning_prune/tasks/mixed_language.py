"""Texts of several domains for a causal language model, mixed in proportions that can change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from lightning_prune.errors import PruneError, refusal
from lightning_prune.proportions import as_proportions, check_domains
from lightning_prune.tasks.language_encoding import Counts
from lightning_prune.tasks.language_sources import SampleBy
from lightning_prune.tasks.language_text import LanguageDataModule
from lightning_prune.tasks.mixing import DomainLoader, MixedLoader
from lightning_prune.tasks.pretrained import Objective
from lightning_prune.tasks.sources import TextSource
from lightning_prune.tasks.token_rows import Stream, TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MixedLanguageDataModule"]


class MixedLanguageDataModule(L.LightningDataModule):
    """Packed texts of several domains, for a `CausalLM`.

    Each domain is encoded as `LanguageDataModule` does it. For every training row the domain is
    drawn from the proportions, which `DynamicBatchLoading` can change; validation batches are of
    one domain each. Texts are loaded in the process that trains. A domain that is used up begins
    again in another order, so one epoch may show some rows several times and others never.

    Args:
        sources: Where the texts of every domain are, by its name; see `LanguageDataModule`.
        proportions: How often each domain is drawn at first, above 0 and adding up to 1; None for
            the share that it has of all rows.
        tokenizer: As in `LanguageDataModule`, as are the arguments not described here.
        gguf_file: The file that `tokenizer` names.
        text_field: The column of the texts, in all sources.
        block_size: Tokens of a row.
        keep_remainder: Whether the tokens that do not fill a domain's last row are kept.
        sample_by: What an example of a TXT file is.
        validation: Sources of their own for validation, for all domains or for some.
        validation_fraction: Of a domain that has no others to validate on.
        batch_size: Training rows per step and rank, at least 1.
        eval_batch_size: The same for validation; None for `batch_size`.
        batches_per_epoch: Training batches of an epoch, per rank, at least 1; None for as many as
            fill with all rows.
        seed: Of the draws and of every domain's order, at least 0.

    Raises:
        PruneError: An argument is outside its range; on first use: the data, the tokenizer or the
            model does not fit the arguments.
    """

    objective: Objective = "causal"

    def __init__(
        self,
        sources: dict[str, TextSource],
        proportions: dict[str, float] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        gguf_file: str | None = None,
        text_field: str | None = None,
        block_size: int = 256,
        keep_remainder: bool = False,
        sample_by: SampleBy = "document",
        validation: dict[str, TextSource] | None = None,
        validation_fraction: float = 0.1,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        batches_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not sources:
            raise _refused("sources", sources, "at least one domain")
        if batches_per_epoch is not None and batches_per_epoch < 1:
            raise _refused("batches_per_epoch", batches_per_epoch, "an integer of at least 1")
        if seed < 0:
            raise _refused("seed", seed, "an integer of at least 0")
        if proportions is not None:
            as_proportions(proportions, list(sources), "MixedLanguageDataModule(proportions=...)")
        strange = [name for name in validation or {} if name not in sources]
        if strange:
            check_domains(
                validation or {},
                sources,
                what="validation source",
                where="MixedLanguageDataModule(validation=...)",
            )
        self.proportions = proportions
        self.tokenizer, self.gguf_file = tokenizer, gguf_file
        self.batch_size, self.batches_per_epoch, self.seed = batch_size, batches_per_epoch, seed
        self.parts: dict[str, LanguageDataModule] = {}
        for name, source in sources.items():
            with _naming(name):
                self.parts[name] = LanguageDataModule(
                    source,
                    tokenizer=tokenizer,
                    gguf_file=gguf_file,
                    text_field=text_field,
                    pack=True,
                    block_size=block_size,
                    keep_remainder=keep_remainder,
                    sample_by=sample_by,
                    validation=(validation or {}).get(name),
                    validation_fraction=validation_fraction,
                    batch_size=batch_size,
                    eval_batch_size=eval_batch_size,
                    seed=seed,
                )
        self._rows: TokenRows | None = None
        self._loader: MixedLoader | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains, in the order of the sources."""
        return tuple(self.parts)

    def prepare_data(self) -> None:
        """Downloads hub data sets, in one process only."""
        for name, part in self.parts.items():
            with _naming(name):
                part.prepare_data()

    def setup(self, stage: str) -> None:
        """Reads and tokenises what the stage needs, unless that was done before."""
        for name, part in self.parts.items():
            part.trainer = self.trainer
            with _naming(name):
                part.tokenizer = self.get_tokenizer()
                part.setup(stage)

    def counts(self, domain: str, split: str) -> Counts:
        """What became of the texts of a domain; `split` is "train" or "validation"."""
        return self.parts[domain].counts("train" if split == "train" else "validation")

    def train_dataloader(self) -> MixedLoader:
        """Batches whose rows are of domains drawn one by one."""
        trainer, ranks = self.trainer, {}
        if trainer is not None:
            ranks = trainer.distributed_sampler_kwargs or {}
            if getattr(trainer, "overfit_batches", 0):
                raise refusal(
                    "The same batches cannot be drawn in every epoch",
                    where="Trainer(overfit_batches=...), MixedLanguageDataModule",
                    got=getattr(trainer, "overfit_batches", 0),
                    allowed="0",
                    fix="overfit on one domain, with LanguageDataModule",
                )
        rows = {name: part.encoded("train") for name, part in self.parts.items()}
        if self._rows is None:
            self._rows = _joined(list(rows.values()))
        self._loader = MixedLoader(
            self._rows,
            {name: len(part) for name, part in rows.items()},
            batch_size=self.batch_size,
            proportions=self.proportions,
            batches=self.batches_per_epoch,
            seed=self.seed,
            num_replicas=ranks.get("num_replicas", 1),
            rank=ranks.get("rank", 0),
        )
        if self._restored is not None:
            self._loader.load_state_dict(self._restored)
            self._restored = None
        return self._loader

    def val_dataloader(self) -> DomainLoader:
        """All validation rows, in batches of one domain."""
        return DomainLoader({name: part.val_dataloader() for name, part in self.parts.items()})

    def state_dict(self) -> dict[str, Any]:
        """The training loader's; Lightning restores a loader only in the middle of an epoch."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next training loader go on where the saved one stopped."""
        self._restored = state_dict

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded on first use.

        Raises:
            PruneError: There is no such tokenizer, or none is known.
        """
        first = next(iter(self.parts.values()))
        first.trainer = self.trainer
        return first.get_tokenizer()


def _joined(parts: Sequence[TokenRows]) -> TokenRows:
    """All rows of all parts, in their order."""
    streams = [part.stream for part in parts]
    starts, offset = [], 0
    for part in parts:
        starts.append(part.start_N + offset)
        offset += len(part.stream.tokens_L)
    return TokenRows(
        stream=Stream(
            tokens_L=torch.cat([s.tokens_L for s in streams]),
            counted_L=torch.cat([s.counted_L for s in streams]),
            lengths_N=torch.cat([s.lengths_N for s in streams]),
        ),
        start_N=torch.cat(starts),
        lengths_N=torch.cat([part.lengths_N for part in parts]),
        pad_token_id=parts[0].pad_token_id,
        pad_to_multiple_of=parts[0].pad_to_multiple_of,
    )


@contextmanager
def _naming(domain: str) -> Iterator[None]:
    """Says of a refusal which domain it is about."""
    try:
        yield
    except PruneError as error:
        error.add_note(f"  domain:  {domain}")
        raise


def _refused(name: str, value: Any, allowed: str) -> Exception:
    return refusal(
        "The texts cannot be mixed in this way",
        where=f"MixedLanguageDataModule({name}=...)",
        got=value,
        allowed=allowed,
        fix=f"give another {name}",
    )
