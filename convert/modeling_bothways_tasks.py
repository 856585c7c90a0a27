"""Fine-tuned bothways models in PyTorch, for `transformers`; beside modeling_bothways.py, which has the bodies."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import modeling_outputs

from .modeling_bothways import ACTIVATIONS, BothwaysModel, BothwaysPreTrainedModel, Norm, Pooler


def mean_over(x, real):
    return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


class WithTaskHead(BothwaysPreTrainedModel):
    """A body under one linear layer, in float32; `task` in config.json says what it reads."""

    def __init__(self, config):
        super().__init__(config)
        m, self.model = config.model, BothwaysModel(config)
        pooled = config.family == "bert" and (m["next_sentence"] or m["pooler"])
        self.nsp = Pooler(m, classes=False) if pooled else None
        outputs = {"regress": 1, "choice": 1, "span": 2}.get(config.task["kind"], len(config.task["labels"]))
        self.task_head = nn.Linear(m["d_model"], outputs)
        hidden = config.task.get("hidden", "")
        self.hidden = {"": None, "tanh": torch.tanh}.get(hidden) or ACTIVATIONS.get(hidden)
        if hidden:
            bias = config.task.get("hidden_bias")
            self.task_head.dense = nn.Linear(m["d_model"], m["d_model"], bias=m["bias"] if bias is None else bias)
        if config.task.get("hidden_norm"):
            self.task_head.norm = Norm(m, m["d_model"])
        self.post_init()

    def read(self, input_ids, attention_mask=None, token_type_ids=None):
        config, real = self.config, torch.ones_like(input_ids) if attention_mask is None else attention_mask
        how = {"token_type_ids": token_type_ids} if config.family == "bert" else {}
        both = config.task.get("both_ways")  # None: of hybrid runs, as before there was a choice
        how["both_ways"] = config.objective == "hybrid" if both is None else both
        x = self.model(input_ids, real, **how).last_hidden_state.float()
        if config.task["kind"] in ("tag", "span"):
            return self.scores(x)
        if config.task["pool"] == "late":
            return mean_over(self.scores(x), real)
        if config.task["pool"] == "mean":
            x = mean_over(x, real)
        elif config.family == "gpt":
            at = torch.arange(real.shape[1], device=real.device)
            x = x[torch.arange(len(x), device=x.device), (at * real).argmax(1)]
        else:
            x = self.nsp(x) if self.nsp is not None else x[:, 0]
        return self.scores(x)

    def scores(self, x):
        x = x if self.hidden is None else self.hidden(self.task_head.dense(x))
        return self.task_head(self.task_head.norm(x) if hasattr(self.task_head, "norm") else x)


class BothwaysForSequenceClassification(WithTaskHead):
    """Classes of a text, or its number."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **unused):
        logits, loss = self.read(input_ids, attention_mask, token_type_ids), None
        if labels is not None and self.config.task["kind"] == "regress":
            loss = F.mse_loss(logits[:, 0], labels.float())
        elif labels is not None and self.config.task["kind"] == "multilabel":
            loss = F.binary_cross_entropy_with_logits(logits, labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)
        return modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class BothwaysForTokenClassification(BothwaysForSequenceClassification):
    """A class of every token."""


class BothwaysForQuestionAnswering(WithTaskHead):
    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **unused):
        begin, end = self.read(input_ids, attention_mask, token_type_ids).unbind(-1)
        return modeling_outputs.QuestionAnsweringModelOutput(start_logits=begin, end_logits=end)


class BothwaysForMultipleChoice(WithTaskHead):
    """Inputs are [B, C, T], a row for each of C choices."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **unused):
        rows = [None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, token_type_ids)]
        logits = self.read(*rows).reshape(input_ids.shape[:2])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return modeling_outputs.MultipleChoiceModelOutput(loss=loss, logits=logits)
