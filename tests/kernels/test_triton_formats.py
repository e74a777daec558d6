"""A model with quantised weights on a GPU is the model whose weights are what the numbers stand for."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sessile.contract.plan import SCRATCH_PAGE
from sessile.device import gpu_factory
from sessile.device.config import DeviceOptions
from sessile.device.gpu_factory import open_gpu
from sessile.kernels.linear import PlainWeight
from sessile.model import gpu_linear
from sessile.model.config import ModelOptions
from sessile.model.fused_gpu import FusedDecoder
from sessile.model.layers import Decoder, Linear, WeightFormat
from sessile.model.weights import load_model
