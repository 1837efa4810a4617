"""Processes that are forked from one that has loaded what most of clora needs: they start at once, not after seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable

import pytest

PRELOADED = (
    "clora.commands.distill",
    "diffusers.models.autoencoders.autoencoder_kl_flux2",
    "diffusers.models.transformers.transformer_flux2",
    "diffusers.pipelines.flux2.pipeline_flux2_klein",
    "diffusers.loaders.peft",
    "transformers.models.qwen3.modeling_qwen3",
)


def start(target: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    """Calls a function of a module in a process of its own, which has a user's environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        # For the tests of the kernels. The server, which the first process starts, reads it as it loads Triton.
        patch.delenv("TRITON_INTERPRET", raising=False)
        process.start()
    return process


def write_to(file: str) -> None:
    """Sends what this process and its own ones print to a file, and gives them no input."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdin = open(os.devnull)  # noqa: SIM115
