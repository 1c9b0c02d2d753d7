"""What `forked.fork` loads once, for all processes that it forks: the whole job, the server, and their libraries."""

import torch.utils.tensorboard
import transformers.models.bert.modeling_bert

import tuneserve.serving.engines.openvino
import tuneserve.serving.http.server
import tuneserve.training.job
from tuneserve.network.graph import load_openvino

load_openvino()  # not by its name: it would tell its makers

__all__ = ["torch", "transformers", "tuneserve"]
