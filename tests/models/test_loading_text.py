"""Text and tokens: special tokens, answers behind prompts, and where words are.

With the kinds of tokenizer that there are, trained here on a few sentences.
"""

import json
from dataclasses import replace

import pytest
import torch
from families import tiny
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mechtut.editing.evaluation import zsre_correct
from mechtut.editing.requests import context_templates, locate
from mechtut.models.loading import (
    document_start,
    embedding_std,
    load_model,
    readable_token,
)
from mechtut.neurons.statistics import excerpts
from mechtut.prompts.facts import continues_with, load_zsre, target_ids
from mechtut.prompts.few_shot import ICLPrompt, answer_ids, encode, layout
from mechtut.prompts.subject_noise import find_subject, token_spans

TEXTS = [
    "The singer Ana works as a singer in Bangkok, the pilot Ben as a pilot in Rome.",
    "Ana in Rome is a pilot. hot cold big small. Q: hot A: cold",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|endoftext|>"]


def byte_level(bos=None, adds_bos=False):
    """GPT-2's kind: bytes, the space belongs to the word behind it."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 330, "special_tokens": SPECIAL, "show_progress": False}
    own.train_from_iterator(
        TEXTS, trainers.BpeTrainer(initial_alphabet=alphabet, **how)
    )
    return _wrapped(own, bos, adds_bos)


def sentence_piece(bos="<s>", adds_bos=True):
    """Llama 2's kind: a space is put in front of every text."""
    own = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    own.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    own.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    how = {"special_tokens": [*SPECIAL, *bytes_], "show_progress": False}
    words = (w.replace(" ", "▁") for t in TEXTS for w in (" " + t).split(" "))
    marked = ["▁" + w for w in words if w]
    own.train_from_iterator(marked, trainers.BpeTrainer(vocab_size=400, **how))
    return _wrapped(own, bos, adds_bos)


def _wrapped(own, bos, adds_bos):
    if adds_bos:
        number = own.token_to_id(bos)
        own.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, number)]
        )
    given = {"bos_token": bos} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", eos_token="</s>", **given
    )


def model_with(tokenizer, **options):
    return load_model(tiny("llama", vocab_size=len(tokenizer)), tokenizer, **options)


GPT2 = model_with(byte_level())
LLAMA2 = model_with(sentence_piece())
CHAT = model_with(byte_level("<|im_start|>"))
GEMMA = model_with(byte_level("<s>", adds_bos=True))
EVERY = pytest.mark.parametrize("model", [GPT2, LLAMA2, CHAT, GEMMA])


# --- special tokens


def test_special_tokens_are_those_that_the_tokenizer_adds():
    bos = LLAMA2.tokenizer.bos_token_id
    for model, first in ((LLAMA2, [bos]), (GEMMA, [bos]), (CHAT, []), (GPT2, [])):
        plain = model.tokenizer("Ana is", add_special_tokens=False)["input_ids"]
        assert model.encode("Ana is") == [*first, *plain]
    prompt = ICLPrompt([("hot", "cold")], "big", "small")
    marker = CHAT.tokenizer.bos_token_id
    assert marker not in encode(CHAT, prompt).ids
    assert marker not in next(iter(excerpts(CHAT, TEXTS * 3, 6, 4)))
    added = replace(CHAT, add_bos=True)
    assert encode(added, prompt).ids == [marker, *encode(CHAT, prompt).ids]
    assert layout(added, prompt).roles[0] == "bos"
    assert layout(CHAT, prompt).roles[0] == "structural"


@pytest.mark.parametrize("model", [LLAMA2, GEMMA, replace(CHAT, add_bos=True)])
def test_no_second_bos(model):
    token, number = model.tokenizer.bos_token, model.tokenizer.bos_token_id
    ids = model.encode(f"{token}Ana is")
    assert ids[0] == number and ids.count(number) == 1


def test_adding_a_bos_that_there_is_not():
    with pytest.raises(ValueError, match="has no BOS token"):
        model_with(byte_level(), add_bos=True)
    assert load_model(CHAT, add_bos=True).add_bos and not CHAT.add_bos


def test_documents_begin_as_in_training():
    starts = [
        m.tokenizer.convert_ids_to_tokens(document_start(m)) for m in (LLAMA2, CHAT)
    ]
    assert starts == ["<s>", "<|endoftext|>"]
    for text in context_templates(CHAT, lengths=((2, 3),)):
        assert "im_start" not in text


def test_statistics_leave_special_tokens_out():
    rows = LLAMA2.embed.weight.detach()
    with torch.no_grad():
        rows[1] = 1000.0
    special = set(LLAMA2.tokenizer.all_special_ids)
    mine = [i for i in range(len(LLAMA2.tokenizer)) if i not in special]
    assert embedding_std(LLAMA2) == pytest.approx(float(rows[mine].double().std()))
    assert embedding_std(LLAMA2, ["Ana", "Ben"]) < 10


# --- answers


@EVERY
@pytest.mark.parametrize("answer", ["singer", "Bangkok", "zebra"])
def test_an_answer_is_the_tail_of_prompt_and_answer(model, answer):
    prompt = "Ana works as a"
    whole = model.tokenizer(f"{prompt} {answer}")["input_ids"]
    n = len(model.tokenizer(prompt)["input_ids"])
    for found in (target_ids(model, answer, prompt), target_ids(model, answer)):
        assert found.tolist() == whole[n:]
    spelled = model.decode([*whole[:n], *found.tolist()])
    assert spelled.endswith(f"{prompt} {answer}")
    query = ICLPrompt([("hot", "cold")], "big", answer)
    asked = len(model.tokenizer(query.text)["input_ids"])
    both = model.tokenizer(f"{query.text} {answer}")["input_ids"]
    assert answer_ids(model, query) == both[asked:]


def test_a_prompt_that_ends_in_a_space():
    with pytest.raises(ValueError, match="changes the last token"):
        GPT2.continuation("Ana works as a ", "singer")
    with pytest.raises(ValueError, match="adds no token"):
        GPT2.continuation("Ana", "")


@EVERY
def test_answers_of_several_tokens(model):
    """Known if the model says every token, whatever it would say to the first alone."""
    prompt, said = "Ana works as a", []
    ids = model.to_tokens(prompt)
    for _ in range(3):
        said.append(int(model.logits(ids)[0, -1].argmax()))
        ids = torch.cat([ids, ids.new_tensor(said[-1:])])

    def continuing(*new):
        return replace_continuation(model, list(new))

    assert continues_with(continuing(*said), prompt, "x")[0]
    assert not continues_with(continuing(*said[:2], said[2] ^ 1), prompt, "x")[0]
    assert continues_with(continuing(said[0] ^ 1), prompt, "x") == (
        False,
        model.decode(said[:1]),
    )


def replace_continuation(model, ids):
    """The model, with a text that has these tokens as its answer."""

    class Told(type(model)):
        def continuation(self, prompt, text):
            return ids

    return Told(model.hf, model.tokenizer, model.family, model.name)


# --- where words are


@EVERY
@pytest.mark.parametrize(
    "text, subject",
    [
        ("The singer Ana works", "singer Ana"),
        ("Ana works as a pilot", "Ana"),
        ("In 東京タワー is a pilot", "東京タワー"),
        ("Ana 🗼 works in Rome", "🗼"),
        ("Ana 👩‍🚀 works", "👩‍🚀"),
        ("the café Ñandú in Rome", "café Ñandú"),
    ],
)
@pytest.mark.parametrize("given", ["text", "ids"])
def test_a_subject_is_found_whole(model, text, subject, given):
    ids = model.to_tokens(text).tolist()
    start, stop = find_subject(model, text if given == "text" else ids, subject)
    assert subject in model.decode(ids[start:stop])
    for shorter in ((start + 1, stop), (start, stop - 1)):
        assert subject not in model.decode(ids[slice(*shorter)])
    assert len(model.decode(ids[start:stop]).strip()) == len(subject)


@EVERY
def test_spans_by_decoding_are_those_of_the_tokenizer(model, monkeypatch):
    text = "Ana 🗼 works in 東京 as café"
    exact = token_spans(model, text)[1]
    slow = replace(model, tokenizer=_Slow(model.tokenizer))
    own, found = token_spans(slow, text)
    assert own.endswith(text) and len(found) == len(exact)
    at = len(own) - len(text)
    for (a, b), (c, d) in zip(exact, found, strict=True):
        shown = own[c:d].strip()
        assert a == b or shown == text[a:b].strip() or (c - at, d - at) == (a, b)
        assert a == b or max(c - at, 0) <= a < d - at


class _Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, own):
        self._own = own

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self._own(text, **options)

    def __getattr__(self, name):
        return getattr(self._own, name)


@EVERY
def test_the_subject_that_was_asked_for(model):
    """The hole decides, not the first occurrence of the words."""
    ids, last = locate(model, "Ana in {} is a pilot", "Ana")
    begin, end = token_spans(model, "Ana in Ana is a pilot")[1][last]
    assert begin >= 6 and end == 10 and len(ids) > last
    first = locate(model, "Ana in {} is a pilot", "Ana", "subject_first")[1]
    assert token_spans(model, "Ana in Ana is a pilot")[1][first][0] >= 6


def test_bytes_are_shown():
    ids = GPT2.encode("🗼")
    shown = [readable_token(GPT2, i) for i in ids]
    assert "".join(shown) == r"\xf0\x9f\x97\xbc" and readable_token(GPT2, 9)
    ids = [i for i in LLAMA2.encode("🗼") if i > 4][-4:]
    assert "".join(readable_token(LLAMA2, i) for i in ids) == r"\xf0\x9f\x97\xbc"


@EVERY
def test_unrelated_answers_are_asked_token_by_token(model, tmp_path):
    """zsRE: the ids of every prompt and its target are those of the whole text."""
    line = {"loc": "who works in Rome", "loc_ans": "the pilot Ben"}
    line |= {
        "src": "Ana is a",
        "subject": "Ana",
        "rephrase": "Ana, a",
        "answers": ["x"],
    }
    line["rephrase"] = "Ana, a"
    (tmp_path / "zsre.json").write_text(json.dumps([line]))
    near = load_zsre(tmp_path / "zsre.json", model)[0]["neighborhood_prompts"]
    whole = model.encode("who works in Rome? the pilot Ben")
    first = len(model.encode("who works in Rome?"))
    assert len(near) == len(whole) - first
    for i, asked in enumerate(near, start=first):
        assert asked["ids"] == whole[:i] and asked["target_id"] == whole[i]
    spelled = near[0]["prompt"] + "".join(n["target"] for n in near)
    assert spelled == "who works in Rome? the pilot Ben"
    wanted = [
        int(model.logits(n["ids"])[0, -1].argmax()) == n["target_id"] for n in near
    ]
    case = {"requested_rewrite": {"prompt": "{} is a", "subject": "Ana"}}
    case["requested_rewrite"]["target_new"] = {"str": "pilot"}
    case |= {"paraphrase_prompts": [], "neighborhood_prompts": near}
    assert zsre_correct(model, case)["neighborhood_prompts_correct"] == wanted
