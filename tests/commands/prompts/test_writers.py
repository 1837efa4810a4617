"""Language models of the real classes that write: what they are given, and that a seed decides what they answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from clora.commands.prompts import writers
from clora.commands.prompts.wording import describe_effect, effect_request, templates
from clora.commands.prompts.writers import language_model_writer, load_writer, pipeline_writer
from clora.errors import CloraError
from clora.testing import tiny_pipeline

ASK = ["Say something about snow."]


@pytest.fixture(scope="module")
def klein():
    return tiny_pipeline()


def generate_without_writer(model, inputs, seed, tokens):
    torch.manual_seed(seed)
    return model.generate(**inputs, do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=tokens)[0]


def test_klein_reads_text(klein, short_answers):
    """Qwen3ForCausalLM: the same tokens as by hand, the chat template around the request."""
    writer = pipeline_writer(klein)
    assert (writer.name, writer.sees_pictures) == ("Qwen3ForCausalLM of the pipeline", False)
    answer = writer.answer(ASK, 3)
    text = f"<|im_start|>user\n{ASK[0]}<|im_end|>\n<|im_start|>assistant\n"
    inputs = klein.tokenizer(text, return_tensors="pt")
    ids = generate_without_writer(klein.text_encoder, inputs, 3, 6)[inputs["input_ids"].shape[1] :]
    by_hand = klein.tokenizer.decode(ids, skip_special_tokens=True)
    assert answer == (by_hand.rpartition("\n")[0] if len(ids) == 6 else by_hand)


def test_an_answer_depends_only_on_the_seed(qwen_vl, pair, monkeypatch):
    monkeypatch.setattr(writers, "_decode", lambda processor, ids: ids.tolist())
    monkeypatch.setattr(writers, "MAX_TOKENS", 12)
    writer = language_model_writer("a", *qwen_vl)
    request = effect_request("make it snow", [pair], 2)
    state = torch.get_rng_state()
    first = writer.answer(request, 0)
    assert torch.equal(torch.get_rng_state(), state), "the global random numbers are left as they were"
    torch.rand(3)
    assert writer.answer(request, 0) == first
    assert writer.answer(request, 1) != first


def test_qwen_vl_is_given_the_pictures_in_their_places(qwen_vl, pair, monkeypatch):
    seen = {}
    model, processor = qwen_vl

    def generate(**given):
        seen.update(given)
        return torch.cat([given["input_ids"], torch.tensor([[5, 6, processor.tokenizer.eos_token_id]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    pipeline = SimpleNamespace(text_encoder=model, processor=processor, tokenizer=processor.tokenizer)
    writer = pipeline_writer(pipeline)
    assert writer.sees_pictures
    assert writer.answer(effect_request("make it snow", [pair, pair], 2), 0) == processor.tokenizer.decode([5, 6])
    pictures = processor.image_processor([*pair, *pair], return_tensors="pt")
    torch.testing.assert_close(seen["pixel_values"], pictures["pixel_values"], rtol=0, atol=0)
    text = processor.tokenizer.decode(seen["input_ids"][0])
    places = text.replace("<|image_pad|>", "")
    assert "Example 1, before:\n<|vision_start|><|vision_end|>Example 1, after:\n<|vision_start|>" in places
    assert text.count("<|image_pad|>") == int(seen["image_grid_thw"].prod(1).sum()) // 4
    assert text.endswith("<|im_start|>assistant\n")


def test_large_pictures_are_made_smaller(qwen_vl, monkeypatch):
    seen = []
    processor = SimpleNamespace(
        image_processor=object(),
        chat_template="x",
        apply_chat_template=lambda messages, **_: seen.extend(messages[0]["content"]) or {},
    )
    picture = Image.new("RGB", (2048, 1024))
    writers._inputs(processor, ["a", picture], True)
    assert seen[0] == {"type": "text", "text": "a"}
    assert seen[1]["image"].size == (512, 256)
    assert picture.size == (2048, 1024)


@pytest.mark.parametrize(("template", "given"), [("{{ enable_thinking }}", {"enable_thinking": False}), ("", {})])
def test_thinking_is_switched_off_where_the_template_knows_it(template, given):
    options = {}
    processor = SimpleNamespace(chat_template=template, apply_chat_template=lambda messages, **o: options.update(o))
    writers._inputs(processor, ["a"], False)
    assert {key: value for key, value in options.items() if key == "enable_thinking"} == given


def test_a_cut_off_answer_loses_its_last_line(klein, monkeypatch):
    ids = torch.tensor(klein.tokenizer("one line\nanother li")["input_ids"])
    monkeypatch.setattr(writers, "MAX_TOKENS", len(ids))
    assert writers._decode(klein.tokenizer, ids) == "one line"
    monkeypatch.setattr(writers, "MAX_TOKENS", len(ids) + 1)
    assert writers._decode(klein.tokenizer, ids) == "one line\nanother li"


def test_a_tokenizer_slot_may_hold_a_processor(qwen_vl):
    """As in Flux2Pipeline, whose tokenizer is a processor."""
    model, processor = qwen_vl
    assert pipeline_writer(SimpleNamespace(text_encoder=model, tokenizer=processor)).sees_pictures


def test_text_encoders_that_cannot_write(klein):
    from transformers import CLIPTextConfig, CLIPTextModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=50, **small))
    assert pipeline_writer(SimpleNamespace(text_encoder=clip, tokenizer=klein.tokenizer)) is None
    assert pipeline_writer(SimpleNamespace(text_encoder=klein.text_encoder.model, tokenizer=klein.tokenizer)) is None
    bare = SimpleNamespace(chat_template=None)
    assert pipeline_writer(SimpleNamespace(text_encoder=klein.text_encoder, tokenizer=bare)) is None
    assert pipeline_writer(SimpleNamespace()) is None


def test_a_users_own_model(vision_model_folder, pair, short_answers):
    writer = load_writer(str(vision_model_folder), torch.device("cpu"))
    assert (writer.name, writer.sees_pictures) == ("tiny-llava", True)
    request = effect_request("make it snow", [pair, pair], 2)
    assert writer.answer(request, 0) == writer.answer(request, 0)
    written = describe_effect(writer, "make it snow", [pair, pair], 2, "s", list)
    assert (written.texts, written.by) == (templates("make it snow")[:2], "templates")
    assert "0 of 2 usable from tiny-llava" in written.reason, "it ran, and was not understood"


@pytest.mark.parametrize("name", ["./none", "text", "no_template"])
def test_a_model_that_cannot_be_used(klein, vision_model_folder, tmp_path, name):
    message = "no such folder exists"
    if name == "text":
        klein.text_encoder.save_pretrained(tmp_path / name)
        klein.tokenizer.save_pretrained(tmp_path / name)
        message = "cannot be loaded as a vision-language model"
    if name == "no_template":
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(vision_model_folder)
        processor.chat_template = processor.tokenizer.chat_template = None
        processor.save_pretrained(tmp_path / name)
        AutoModelForImageTextToText.from_pretrained(vision_model_folder).save_pretrained(tmp_path / name)
        message = "has no chat template"
    with pytest.raises(CloraError, match=rf"prompts\.writer: .*{name}.*{message}"):
        load_writer(str(tmp_path / name) if "/" not in name else name, torch.device("cpu"))


def test_a_pickle_is_refused(vision_model_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(vision_model_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CloraError, match="no file named model.safetensors"):
        load_writer(str(folder), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_generators_of_both_devices_are_left_as_they_were(vision_model_folder, pair, short_answers):
    writer = load_writer(str(vision_model_folder), torch.device("cuda"))
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    request = effect_request("make it snow", [pair], 2)
    assert writer.answer(request, 0) == writer.answer(request, 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
