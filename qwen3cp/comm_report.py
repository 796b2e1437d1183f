"""What int8 communication costs in accuracy, on a model and prompts of one's own.

Letters: T tokens of a prompt, H hidden size, V vocabulary.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qwen3cp import collectives
from qwen3cp.batch import host_ids
from qwen3cp.config import check_supported
from qwen3cp.errors import InputError
from qwen3cp.model import CPQwen3MoeForCausalLM, Request
from qwen3cp.parallel import CommConfig, ForwardPhase
from qwen3cp.plan import ForwardPlan
from qwen3cp.plots import new_figure, save_figure

__all__ = ["CommunicationReport", "MessageReport", "error_report"]

MESSAGES = ("attention", "mlp", "kv_gather")
FORMS = ("exact", "int8", "int8_one_shot", "int8_two_step", "mixed")
CHUNK_LOGITS = 1 << 26
"""Logits that are compared at a time: 256 MiB in float32."""


@dataclass(frozen=True)
class MessageReport:
    """One reduction, or the gather, of one layer, over all prompts."""

    layer: int
    message: str
    """attention or mlp, the reductions after them; or kv_gather."""
    form: str
    """exact, int8, int8_one_shot or int8_two_step; mixed if prompts differ."""
    relative_error: float
    """L2 norm of (what arrived - the float32 sum of what was sent) / that of the sum."""
    outlier_ratio: float
    """Largest magnitude / root mean square of what was sent, over all ranks."""


@dataclass(frozen=True)
class CommunicationReport:
    """The errors of int8 communication against exact. The same on every rank."""

    messages: list[MessageReport]
    """By layer; only of those that travel at all."""
    kl_mean: float
    """Kullback-Leibler divergence of the next-token distribution from that with exact
    communication, in nats, mean over all positions of all prompts."""
    kl_max: float
    top1_agreement: float
    """Share of the positions with the same likeliest token."""
    num_positions: int
    topology: dict[str, int]
    dtype: str
    comm: dict[str, Any]
    """The fields of the `CommConfig`."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_table(self) -> str:
        """As text: a row for each layer, and the logits below."""
        named = [name for name in MESSAGES if any(m.message == name for m in self.messages)]
        table = Table("layer")
        for name in named:
            table.add_column(name, justify="right")
        by_place = {(m.layer, m.message): m for m in self.messages}
        for layer in sorted({m.layer for m in self.messages}):
            cells = (by_place.get((layer, name)) for name in named)
            table.add_row(str(layer), *(_cell(message) for message in cells))
        console = Console(file=io.StringIO(), width=100, highlight=False)
        with console.capture() as text:
            if named:
                console.print("Relative error, and largest / root mean square of what was sent")
                console.print(table)
            console.print(
                f"{self.num_positions:,} positions: KL {self.kl_mean:.2e} nats in the mean, at "
                f"most {self.kl_max:.2e};\nthe likeliest token agrees in {self.top1_agreement:.2%}"
            )
        return text.get().rstrip()

    def plot(self, path: str | Path) -> None:
        """Draws errors and outlier ratios over the layers: svg, png or pdf, by the file's name.

        Raises:
            InputError: matplotlib is not installed, or cannot write such a file.
        """
        figure = new_figure(9, 3.5)
        error_axes, outlier_axes = figure.subplots(1, 2)
        for name in MESSAGES:
            of_name = [m for m in self.messages if m.message == name]
            if of_name:
                layers = [m.layer for m in of_name]
                label = f"{name}, {', '.join(sorted({m.form for m in of_name}))}"
                percent = [m.relative_error * 100 for m in of_name]
                error_axes.plot(layers, percent, marker="o", label=label)
                ratios = [m.outlier_ratio for m in of_name]
                outlier_axes.plot(layers, ratios, marker="o", label=label)
        error_axes.set(xlabel="layer", ylabel="relative L2 error, %", ylim=(0, None))
        outlier_axes.set(xlabel="layer", ylabel="largest / root mean square", ylim=(0, None))
        if self.messages:
            error_axes.legend(frameon=False)
        figure.suptitle(
            f"KL {self.kl_mean:.1e} nats, same likeliest token in {self.top1_agreement:.2%} of "
            f"{self.num_positions:,} positions"
        )
        save_figure(figure, path)


def error_report(
    model: CPQwen3MoeForCausalLM,
    prompts: Seq[Seq[int] | torch.Tensor],
    *,
    comm: CommConfig | None = None,
) -> CommunicationReport:
    """Prefills each prompt with exact communication and with `comm`, and compares.

    Every reduction and gather is compared with the float32 result of the same terms, so that the
    errors of the layers are apart; the logits show what becomes of all of them together. Works on
    caches of its own. Collective over the replica: every rank passes the same.

    Args:
        prompts: token ids, as of `CPQwen3MoeForCausalLM.prefill`; they run one by one.
        comm: None is that of the model's context.

    Raises:
        InputError: no prompts, ids that are none, nothing but exact communication.
        ParallelConfigError: settings that do not fit the model.
    """
    ctx = model.parallel_context
    comm = ctx.comm if comm is None else comm
    ids: list[torch.Tensor] = []
    error = None
    try:
        if comm.all_reduce == comm.kv_gather == "exact":
            raise InputError(
                "comm is exact: there is nothing to compare; pass CommConfig(all_reduce=...) or "
                "CommConfig(kv_gather='int8')"
            )
        if len(prompts) == 0:
            raise InputError("error_report needs at least one prompt")
        ids = [host_ids(p, f"prompt {i}", model.vocab_size) for i, p in enumerate(prompts)]
        with ctx.communication(comm):
            check_supported(model.config, ctx)
    except Exception as caught:  # the other ranks have to hear of it, whatever it is
        error = caught
    collectives.agree(ctx, error)

    observer = _Observer(model)
    logits = _LogitErrors()
    for prompt in ids:
        with ctx.communication(CommConfig(check_plan=comm.check_plan)):
            exact = _Rows(model, prompt)
        with ctx.communication(comm), collectives.observe_messages(observer.before):
            rounded = _Rows(model, prompt, observer)
        for expected, actual in zip(exact.logits(model), rounded.logits(model), strict=True):
            logits.add(expected, actual)
    return CommunicationReport(
        messages=observer.reports(),
        kl_mean=logits.kl_sum / logits.count,
        kl_max=logits.kl_max,
        top1_agreement=logits.agree / logits.count,
        num_positions=logits.count,
        topology={"cp": ctx.cp_size, "tp": ctx.tp_size},
        dtype=str(model.dtype).removeprefix("torch."),
        comm=asdict(comm),
    )


class _Rows:
    """One prefill: what this rank's rows become, before the final norm."""

    def __init__(
        self, model: CPQwen3MoeForCausalLM, ids: torch.Tensor, observer: _Observer | None = None
    ) -> None:
        cache = model.new_kv_cache(max_tokens=len(ids))
        request = Request(
            cache=cache,
            sequences=[cache.new_sequence()],
            new_lengths=[len(ids)],
            ids=ids,
            wanted=torch.empty(0, dtype=torch.int64),
        )
        with model.model.step(ForwardPhase.PREFILL, lambda: request) as (_, plan):
            if observer is not None:
                observer.start(plan)
            self.hidden, self.residual = model.model.run(request, plan)
        self.plan, self.length = plan, len(ids)

    def logits(self, model: CPQwen3MoeForCausalLM) -> Iterator[torch.Tensor]:
        """Of all T positions in turn, in chunks: float32 [rows, V]. Collective."""
        step = max(1, CHUNK_LOGITS // model.vocab_size)
        for tokens in torch.arange(self.length).split(step):
            yield model._logits(self.hidden, self.residual, self.plan, tokens).float()


class _LogitErrors:
    def __init__(self) -> None:
        self.kl_sum = self.kl_max = 0.0
        self.agree = self.count = 0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> None:
        """Two times the logits of the same positions, [rows, V]."""
        kl = torch.nn.functional.kl_div(
            actual.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        kl = kl.clamp(min=0)  # rounding alone makes it negative
        self.kl_sum += float(kl.sum(dtype=torch.float64))
        self.kl_max = max(self.kl_max, float(kl.max()))
        self.agree += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        self.count += len(kl)


class _Observer:
    """Sums over all messages of this rank, by layer and message."""

    def __init__(self, model: CPQwen3MoeForCausalLM) -> None:
        self._ctx, self._device = model.parallel_context, model.device
        shape = (len(model.model.layers), len(MESSAGES))
        # on the host: an NPU has few operators for float64
        self._error, self._norm, self._squares, self._count, self._largest, self._form = (
            torch.zeros(6, *shape, dtype=torch.float64).unbind()
        )
        self._plan: ForwardPlan | None = None
        self._reduced: set[int] = set()

    def start(self, plan: ForwardPlan) -> None:
        """A prefill begins."""
        self._plan = plan
        self._reduced.clear()

    def before(self, message: collectives.Message) -> collectives.ResultObserver:
        ctx, plan, layer = self._ctx, self._plan, message.layer
        assert plan is not None and layer is not None
        if message.kind == "kv_gather":
            name = "kv_gather"
            # the rows of this rank, of all that arrive; not those that only pad them
            mine = slice(0, plan.num_rows)
            reference = sent = message.tensor[:, mine].float()
            shape = (ctx.cp_size, *message.tensor.shape)

            def arrived(result: torch.Tensor) -> torch.Tensor:
                return result.view(shape)[ctx.cp_rank, :, mine]
        else:
            # a layer's first reduction is that of its attention
            name = "mlp" if layer in self._reduced else "attention"
            self._reduced.add(layer)
            sent = message.tensor.float()
            reference = collectives.all_reduce(sent, ctx, form="exact")

            def arrived(result: torch.Tensor) -> torch.Tensor:
                return result

        place = (layer, MESSAGES.index(name))
        form = 1 + FORMS.index(message.form)
        self._form[place] = form if self._form[place] in (0, form) else 1 + FORMS.index("mixed")
        self._norm[place] += float(reference.square().sum())
        self._squares[place] += float(sent.square().sum())
        self._count[place] += sent.numel()
        if sent.numel():
            largest = sent.abs().max().double().cpu()
            self._largest[place] = torch.maximum(self._largest[place], largest)

        def after(result: torch.Tensor) -> None:
            self._error[place] += float((arrived(result).float() - reference).square().sum())

        return after

    def reports(self) -> list[MessageReport]:
        """Of all ranks. Collective over world_group."""
        mine = [self._error, self._norm, self._squares, self._count, self._largest, self._form]
        ranks = collectives.gather_ranks(torch.stack(mine).to(self._device), self._ctx).cpu()
        error, norm, squares, count = ranks[:, :4].sum(0)
        largest, form = ranks[:, 4:].amax(0)
        relative = (error / norm).sqrt().nan_to_num(nan=0.0)  # 0 / 0: nothing but zeros
        ratio = (largest / (squares / count).sqrt()).nan_to_num(nan=0.0)
        return [
            MessageReport(
                layer=layer,
                message=MESSAGES[i],
                form=FORMS[int(form[layer, i]) - 1],
                relative_error=float(relative[layer, i]),
                outlier_ratio=float(ratio[layer, i]),
            )
            for layer, i in count.nonzero().tolist()
        ]


def _cell(message: MessageReport | None) -> str:
    if message is None:
        return ""
    return f"{message.relative_error:.3%}, {message.outlier_ratio:5.1f}"
