"""Pages of latents, without a browser: what is in the file, what atoms point at, and what is
refused."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from latents import FIRST, HOSTILE, hostile_contexts, hostile_lm, made_contexts, random_sae
from models import D_MODEL, FAMILIES, VOCAB, save_tiny, tiny_lm, tiny_tokenizer

from jumprelu.__main__ import main
from jumprelu.latents import pages, webpage
from jumprelu.latents.directions import FINAL_NORMS, final_gain, logit_effects, nearest
from jumprelu.latents.pages import Explanation, write_pages
from jumprelu.sites import SITES, capture


def block(html: str, id: str) -> str:
    """The text of a data block, as a browser reads it: up to the first end of a script element."""
    return re.search(rf'<script type="application/json" id="{id}">(.*?)</script', html, re.S)[1]


def unpacked(html: str, id: str, layout: list, count: int) -> dict[str, np.ndarray]:
    raw, found, at = zlib.decompress(base64.b64decode(block(html, id))), {}, 0
    for name, dtype, shape in layout:
        size = count * int(np.prod(shape)) * np.dtype(dtype).itemsize
        found[name] = np.frombuffer(raw[at : at + size], dtype).reshape(count, *shape)
        at += size
    assert at == len(raw)
    return found


# ---- directions


@pytest.mark.parametrize("family", FAMILIES)
def test_logit_effects_are_the_models_own_norm_and_unembedding_up_to_its_division(family):
    lm, sae = tiny_lm(family), random_sae(D_MODEL, 12)
    norm = next(m for name, m in lm.model.named_modules() if name in FINAL_NORMS)
    for parameter in norm.parameters():  # trained norms are not all ones
        torch.nn.init.normal_(parameter, 0.5, 0.3)
    atoms, head = sae.W_dec.detach(), lm.model.get_output_embeddings()
    layer_norm = isinstance(norm, torch.nn.LayerNorm)
    x = atoms - atoms.mean(1, keepdim=True) if layer_norm else atoms
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    with torch.no_grad():
        logits = (head(norm(atoms)) - head(norm(0 * atoms))) * (
            x.square().mean(1, keepdim=True) + eps
        ).sqrt()
    logits -= logits.mean(1, keepdim=True)
    found = logit_effects(lm, sae, torch.arange(12), k=VOCAB)
    torch.testing.assert_close(found.top_value, logits.gather(1, found.top), atol=1e-4, rtol=1e-4)
    assert (found.top_value.diff() <= 0).all() and (found.bottom_value.diff() >= 0).all()
    torch.testing.assert_close(found.bottom_value, found.top_value.flip(1))
    few = logit_effects(lm, sae, torch.tensor([7, 2]), k=3)
    assert torch.equal(few.top, found.top[[7, 2], :3]) and torch.equal(
        few.bottom, found.bottom[[7, 2], :3]
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_atom_of_the_heads_passes_the_output_projection(family):
    lm = tiny_lm(family)
    width = capture(lm, [("attn_out", 1)], torch.tensor([[5, 6]]))["attn_out", 1].shape[-1]
    sae = random_sae(width, 6, site="attn_out")
    block = [
        m
        for name, m in lm.model.named_modules()
        if name.endswith((".h.1.attn.c_proj", ".layers.1.self_attn.o_proj"))
    ][0]
    weight = block.weight.detach() if family == "gpt2" else block.weight.detach().T
    moved = random_sae(D_MODEL, 6)
    moved.W_dec.data = sae.W_dec.data @ weight
    by_hand, found = (
        logit_effects(lm, moved, torch.arange(6)),
        logit_effects(lm, sae, torch.arange(6)),
    )
    assert torch.equal(found.top, by_hand.top)
    torch.testing.assert_close(found.top_value, by_hand.top_value)


def test_the_gain_of_gemmas_norm_is_one_plus_its_weight():
    norm = tiny_lm("gemma2").model.model.norm
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(
        final_gain(norm, D_MODEL), 1 + norm.weight.detach(), atol=1e-5, rtol=1e-5
    )


def test_logit_effects_need_the_place_and_the_width():
    lm = tiny_lm()
    with pytest.raises(ValueError, match="does not remember where"):
        logit_effects(lm, random_sae(D_MODEL, 4, site=None), torch.arange(4))
    with pytest.raises(ValueError, match="d_in = 8, which is not the width of resid_post"):
        logit_effects(lm, random_sae(8, 4), torch.arange(4))
    with pytest.raises(ValueError, match="unknown site"):
        logit_effects(lm, random_sae(D_MODEL, 4, site="there"), torch.arange(4))
    bare = tiny_lm()
    del bare.model.model.norm
    with pytest.raises(ValueError, match="add its final norm to FINAL_NORMS"):
        logit_effects(bare, random_sae(D_MODEL, 4), torch.arange(4))
    for site in SITES[:2]:
        assert logit_effects(lm, random_sae(D_MODEL, 4, site=site), torch.arange(4)).top.shape == (
            4,
            10,
        )


def test_the_nearest_atoms_are_those_of_the_whole_matrix_of_cosines():
    sae = random_sae(8, 600)  # over two blocks
    sae.W_dec.data *= torch.linspace(0.5, 3, 600)[:, None]
    atoms = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = (atoms @ atoms.T).fill_diagonal_(-2)
    found = nearest(sae, torch.arange(600), 5)
    torch.testing.assert_close(found.cosine, cosine.topk(5).values)
    assert torch.equal(found.latents, cosine.topk(5).indices)
    some = torch.tensor([9, 3, 500])
    assert nearest(sae, some).latents.sort().values.tolist() == [[3, 500], [9, 500], [3, 9]]
    assert nearest(sae, some[:1]).latents.shape == (1, 0)


# ---- the parts of a file


def test_data_cannot_end_its_element_and_comes_back():
    for value in ["</script>", "<!--<script>", "\u2028", '"\\', "\x00", {"<": ["<"]}]:
        assert "<" not in webpage.data_text(value) and json.loads(webpage.data_text(value)) == value
    assert json.loads(webpage.data_text("a\ud800b")) == "a?b"
    with pytest.raises(ValueError, match="not JSON compliant"):
        webpage.data_text(float("nan"))


def test_shades_keep_what_is_positive_and_nothing_else():
    acts = torch.tensor([[[0.0, 1e-9, 1.0, 2.0, 4.0]], [[0.0, 0, 0, 0, 0]]])
    assert webpage.shades(acts, torch.tensor([4.0, 0.0])).tolist() == [
        [[0, 1, 64, 128, 255]],
        [[0, 0, 0, 0, 0]],
    ]


def test_the_vocabulary_has_each_token_once():
    known, (a, b) = webpage.vocabulary(torch.tensor([[7, -1], [3, 7]]), torch.tensor([3, 9]))
    assert known.tolist() == [3, 7, 9] and a.tolist() == [[2, 0], [1, 2]] and b.tolist() == [1, 3]
    assert webpage.narrow(torch.tensor([2**16 - 1])).dtype == np.uint16
    assert webpage.narrow(torch.tensor([2**16])).dtype == np.uint32


def test_tokens_keep_their_space():
    lm, byte = tiny_lm(), tiny_tokenizer()
    assert webpage.token_texts(lm.tokenizer, torch.tensor([5, 9])) == ["#5", "#9"]
    ids = byte(" a<", add_special_tokens=False)["input_ids"]
    object.__setattr__(lm, "tokenizer", byte)
    assert webpage.token_texts(lm.tokenizer, torch.tensor(ids)) == [" ", "a", "<"]
    half = byte("é", add_special_tokens=False)["input_ids"][:1]
    assert webpage.token_texts(lm.tokenizer, torch.tensor([2, *half])) == ["<bos>", "\ufffd"]
    assert (
        webpage.token_texts(hostile_lm().tokenizer, torch.arange(FIRST, FIRST + len(HOSTILE)))
        == HOSTILE
    )


# ---- the page


def test_the_file_holds_the_contexts(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "BLOCK", 16)  # 40 latents: three blocks, the last one short
    lm, sae, contexts = hostile_lm(), random_sae(D_MODEL, 50), hostile_contexts(40)
    texts = {2: Explanation("</script><b>", 0.25), 5: Explanation("without score")}
    html = write_pages(
        tmp_path / "deep" / "x.html", sae, lm, contexts, texts, title="</title>%%script%%"
    ).read_text()
    about, latents, words = (
        json.loads(block(html, id)) for id in ("about", "latents", "vocabulary")
    )
    assert latents["peak"][39] == [] and words[latents["peak"][5][0]] in {
        *webpage.token_texts(lm.tokenizer, contexts.tokens[5, 0][contexts.acts[5, 0] == 6])
    }
    assert (
        about["title"] == "</title>%%script%%" and "<title>&lt;/title&gt;%%script%%</title>" in html
    )
    assert not about["all"] and about["d_sae"] == 50 and latents["number"] == list(range(40))
    assert (
        latents["score"][2] == 0.25
        and latents["score"].count(None) == 39
        and latents["explanation"][5] == "without score"
    )
    assert latents["threshold"] == pytest.approx(sae.threshold[:40].tolist(), rel=1e-4)
    assert latents["encoder"] == pytest.approx(sae.W_enc.norm(dim=0)[:40].tolist(), rel=1e-4)
    whole = [unpacked(html, f"block-{i}", about["layout"], n) for i, n in enumerate([16, 16, 8])]
    arrays = {name: np.concatenate([part[name] for part in whole]) for name in whole[0]}
    wanted = [
        [
            [
                ("" if t < 0 else webpage.token_texts(lm.tokenizer, torch.tensor([t]))[0])
                for t in line
            ]
            for line in lines
        ]
        for lines in contexts.tokens[:4].tolist()
    ]
    assert [
        [[words[t] for t in line] for line in lines] for lines in arrays["tokens"][:4]
    ] == wanted
    exact = contexts.acts / contexts.maximum.clamp_min(1e-9)[:, None, None] * 255
    assert ((arrays["acts"] - exact.numpy() >= -1e-3) & (arrays["acts"] - exact.numpy() < 1)).all()
    assert ((arrays["acts"] > 0) == (contexts.acts.numpy() > 0)).all()
    for name in ("quantile", "histogram"):
        assert np.array_equal(arrays[name], getattr(contexts, name))
    assert np.array_equal(arrays["where"][..., 2], contexts.position)
    effects = logit_effects(lm, sae, contexts.latents)
    assert [words[t] for t in arrays["top"][3]] == webpage.token_texts(lm.tokenizer, effects.top[3])


def test_the_file_asks_for_nothing_and_runs_nothing_of_the_corpus(tmp_path):
    html = write_pages(
        tmp_path / "x.html", random_sae(D_MODEL, 40), hostile_lm(), hostile_contexts()
    ).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert (
        "default-src &#x27;none&#x27;" in policy
        and "connect-src &#x27;none&#x27;" in policy
        and "unsafe" not in policy
    )
    assert (
        not re.search(r'\b(src|href)="(?!data:,"|#")', html)
        and "@import" not in html
        and "url(" not in html
    )
    assert html.count("<script>") == 1 and "<img" not in html and "<base" not in html


def test_what_does_not_belong_together_is_refused(tmp_path):
    lm, sae, contexts, out = (
        hostile_lm(),
        random_sae(D_MODEL, 40),
        hostile_contexts(),
        tmp_path / "x.html",
    )
    cases = [
        (
            contexts._replace(latents=torch.arange(1, 41)),
            {},
            "must be of latents of this SAE, 0 to 39",
        ),
        (contexts._replace(tokens=contexts.tokens + VOCAB), {}, "of another model"),
        (contexts, {77: Explanation("x")}, r"without contexts: \[77\]"),
        (contexts, {3: Explanation("x", float("nan"))}, "not JSON compliant"),
    ]
    for given, texts, message in cases:
        with pytest.raises(ValueError, match=message):
            write_pages(out, sae, lm, given, texts)
    assert not out.exists()


def test_one_latent_that_never_fires_is_a_page(tmp_path):
    contexts = made_contexts([6], torch.full((1, 4, 5), 9))
    html = write_pages(tmp_path / "x.html", random_sae(D_MODEL, 8), tiny_lm(), contexts).read_text()
    assert json.loads(block(html, "latents"))["peak"] == [[]]


# ---- command line


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a model `lm`, an SAE `sae` and a corpus `texts.jsonl`."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny("llama", folder / "lm", tokenizer=True)
    random_sae(D_MODEL, 24).save(folder / "sae")
    texts = [{"text": f"def function_{i}(x):\n    return '<b>' + x[{i}]\n" * 3} for i in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


def run(files: Path, *more: str) -> int:
    arguments = [
        str(files / "sae"),
        str(files / "lm"),
        str(files / "out.html"),
        "--corpus",
        str(files / "texts.jsonl"),
    ]
    return main(
        ["pages", *arguments, "--split", "train", "--rows", "40", "--context-size", "24", *more]
    )


def test_the_command_line_writes_a_page(files, tmp_path, capsys):
    table = tmp_path / "e.csv"
    table.write_text("latent,explanation,score\n3,after a bracket,0.5\n4,=cmd,\n")
    assert run(files, "--explanations", str(table)) == 0 and "24 latents" in capsys.readouterr().out
    html = (files / "out.html").read_text()
    latents = json.loads(block(html, "latents"))
    assert latents["explanation"][3:5] == ["after a bracket", "=cmd"] and latents["score"][3:5] == [
        0.5,
        None,
    ]
    assert max(latents["frequency"]) > 0.05
    assert run(files, "--latents", "7", "2") == 0
    assert json.loads(block((files / "out.html").read_text(), "latents"))["number"] == [7, 2]


def test_the_command_line_says_what_is_wrong(files, tmp_path, capsys):
    table = tmp_path / "e.csv"
    for text, message in [
        ("a,b\n", "lacks the column explanation and latent"),
        ("latent,explanation\nx,y\n", "expected the number of a latent"),
        ("latent,explanation\n1,y\n1,z\n", "latent 1 twice"),
    ]:
        table.write_text(text)
        assert run(files, "--explanations", str(table)) == 2 and message in capsys.readouterr().err
    assert (
        main(
            [
                "pages",
                str(files / "sae"),
                str(save_tiny("llama", tmp_path / "mute")),
                str(tmp_path / "o.html"),
            ]
        )
        == 2
    )
    assert "has no tokenizer" in capsys.readouterr().err
    assert main(["pages", str(tmp_path / "none"), str(files / "lm"), str(tmp_path / "o.html")]) == 2
    assert capsys.readouterr().err.startswith("error: no SAE at")
