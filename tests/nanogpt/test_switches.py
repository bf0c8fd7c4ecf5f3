"""nanogpt's --attention and --position: all implementations agree, and unavailable ones are refused."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import evaluate
import sample
import train
from lightning_gpt import NanoGPT
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.cli import parse_evaluate
from lightning_gpt.evaluation.evaluate import evaluate as score
from lightning_gpt.implementations.cache import Cache
from nanogpt.alibi import alibi_bias, alibi_slopes, flex_alibi
from nanogpt.model import GPT, CausalSelfAttention, GPTConfig

V, C, S = 61, 48, 16
NANO = ["--implementation=nanogpt"]
ALIBI = [*NANO, "--position=alibi"]
WPE = "transformer.wpe.weight"
# MPT's parameter names, and ours.
MPT = {
    "blocks": "h",
    "norm_f": "ln_f",
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attn.Wqkv": "attn.c_attn",
    "attn.out_proj": "attn.c_proj",
    "ffn.up_proj": "mlp.c_fc",
    "ffn.down_proj": "mlp.c_proj",
}


def model_of(**fields) -> GPT:
    """Build a model in eval mode with random weights, so that every weight affects the logits."""
    torch.manual_seed(0)
    sizes = {"block_size": S, "vocab_size": V, "n_layer": 2, "n_head": 6, "n_embd": C}
    model = GPT(GPTConfig(**(sizes | fields)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens(T=S, B=3) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


# ALiBi


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [(8, [1, 2, 3, 4, 5, 6, 7, 8]), (16, [n / 2 for n in range(1, 17)]), (6, [2, 4, 6, 8, 1, 3]), (1, [8])]
    + [(12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])],
)
def test_slopes_match_the_paper(heads, exponents):
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor([2.0**-e for e in exponents]), rtol=1e-6, atol=0)


def test_slopes_match_bloom_for_any_number_of_heads():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in range(1, 70):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
@pytest.mark.parametrize("n_head", [4, 6])
def test_logits_match_mpt(attention, n_head):
    """Compare with transformers' MPT, which is the same model without biases."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": C, "n_heads": n_head, "n_layers": 2, "max_seq_len": 2 * S, "vocab_size": V}
    torch.manual_seed(0)
    theirs = transformers.MptForCausalLM(transformers.MptConfig(**sizes, expansion_ratio=4)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = model_of(bias=False, position="alibi", attention=attention, n_head=n_head, block_size=2 * S)
    weights = theirs.state_dict()
    for their_name, name in MPT.items():
        weights = {key.replace(their_name, name): weight for key, weight in weights.items()}
    ours.load_state_dict(weights)
    idx = tokens(2 * S)
    expected = theirs(idx).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(idx, idx)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["learned", "alibi"])
def test_manual_equals_sdpa_with_gradients(position):
    found = []
    for attention in ("sdpa", "manual"):
        model = model_of(position=position, attention=attention)
        logits, loss = model(tokens(), tokens().roll(1, 0))
        loss.backward()
        found.append((logits, loss, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    other = model_of(position="alibi" if position == "learned" else "learned")
    assert (found[0][0] - other(tokens(), tokens())[0]).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("heads", [4, 6])
def test_flex_attention_equals_biased_sdpa(heads):
    """Run the attention that a GPU would compile, here eagerly, on a sequence of more than one block."""
    T = 256
    q, k, v = torch.randn(3, 2, heads, T, 16, generator=torch.Generator().manual_seed(0))
    slopes = alibi_slopes(heads)
    with torch.compiler.set_stance("force_eager"):
        found = flex_alibi(heads, T, q.device)(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, alibi_bias(slopes, torch.arange(T), T))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_flex_attention_compiles_once():
    """Check that a new bias of the same kind, which each length builds once, causes no recompilation."""
    slopes, T = alibi_slopes(6), 128
    attend = model_of(position="alibi").transformer.h[0].attn
    x = torch.randn(2, T, C)
    expected = attend(x, mask=alibi_bias(slopes, torch.arange(T), T)).detach()
    compiled = torch.compile(attend)
    with torch.no_grad():
        for call in (attend, compiled):
            mask = flex_alibi(6, T, x.device)
            torch.testing.assert_close(call(x, mask=mask), expected, rtol=1e-5, atol=1e-5)
            flex_alibi.cache_clear()
            with torch.compiler.set_stance("fail_on_recompile"):
                call(x, mask=flex_alibi(6, T, x.device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bias_is_built_once_in_the_attention_dtype(dtype, monkeypatch):
    model, seen = model_of(position="alibi"), []
    attend = F.scaled_dot_product_attention

    def watch(q, k, v, mask, **rest):
        seen.append(mask)
        return attend(q, k, v, mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        model(tokens(), tokens())
    assert len(seen) == 2 and seen[0] is seen[1] and seen[0].dtype is dtype and seen[0].shape == (1, 6, S, S)


def test_alibi_has_no_position_embedding_and_extends():
    alibi, learned = model_of(position="alibi"), model_of()
    assert {n for n, _ in learned.named_parameters()} - {n for n, _ in alibi.named_parameters()} == {WPE}
    assert not list(alibi.buffers()) and (alibi.extends_context, learned.extends_context) == (True, False)
    assert alibi.get_num_params() == alibi.get_num_params(False) == learned.get_num_params()
    whole = alibi(tokens(8), tokens(8))[0]
    alibi.crop_block_size(8)
    assert torch.equal(alibi(tokens(8), tokens(8))[0], whole)
    with pytest.raises(ValueError, match="block_size=8"):
        alibi(tokens(9))
    module = NanoGPT(vocab_size=V, block_size=S, model_type="gpt-nano", position="alibi")
    assert module.model.extends_context


def test_alibi_scores_a_longer_context(saved_model, tmp_path):
    """Compare with a loop that scores each token in a forward pass of its own."""
    text = "".join(np.random.default_rng(0).choice(list("abc\n "), size=1300))
    (tmp_path / "letters.txt").write_text(text)
    path, (size, stride) = saved_model("nanogpt", position="alibi"), (40, 9)
    flags = [f"--checkpoint={path}", f"--data={tmp_path / 'letters.txt'}", "--accelerator=cpu"]
    found = score(parse_evaluate([*flags, f"--block_size={size}", f"--stride={stride}"])).scores[0].loss
    checkpoint = open_checkpoint(path)
    checkpoint.extend_context(size)
    model, val = checkpoint.module().eval().model, torch.from_numpy(checkpoint.tokenizer.encode(text[-130:]))
    rows = [val[max(0, math.ceil((t - size) / stride)) * stride : t] for t in range(1, 130)]
    with torch.no_grad():
        last = [model(row[None])[0][0, -1].log_softmax(-1) for row in rows]
    nats = [-likely[token].item() for likely, token in zip(last, val[1:], strict=True)]
    assert found == pytest.approx(sum(nats) / 129, rel=1e-5)
    assert found != pytest.approx(score(parse_evaluate(flags)).scores[0].loss, rel=1e-4)


def test_learned_positions_refuse_a_longer_context(saved_model, refused):
    err = refused(evaluate.main, f"--checkpoint={saved_model('nanogpt')}", "--block_size=13")
    assert "--block_size 13" in err and "end at the 12" in err


@pytest.mark.parametrize("form", ["hf", "nanogpt"])
def test_alibi_export_to_gpt2_formats_is_refused(saved_model, tmp_path, form, refused):
    path = saved_model("nanogpt", position="alibi")
    err = refused(evaluate.main, f"--checkpoint={path}", f"--export={form}", f"--out={tmp_path / 'out'}")
    assert "--position alibi" in err and "--export safetensors or pt" in err and not (tmp_path / "out").exists()


def test_alibi_export_to_canonical_formats(saved_model, export):
    path = saved_model("nanogpt", position="alibi")
    folder, _ = export(path, "safetensors")
    assert open_checkpoint(folder).hash() == open_checkpoint(path).hash()
    model = open_checkpoint(folder).module().model
    assert model.extends_context
    plain = torch.load(export(path, "pt")[0] / "model.pt")
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, plain[name]) for name, weight in model.state_dict().items())


TINY = "--max_steps=2 --eval_interval=2 --batch_size=4 --logger=none --accelerator=cpu --sample_tokens=0".split()


def test_init_from_requires_the_same_positions(saved_model, tmp_path, capsys, refused):
    data = tmp_path / "letters.txt"
    data.write_text("abc\n " * 200)
    flags = [*TINY, f"--data={data}", f"--out_dir={tmp_path / 'run'}"]
    source = [f"--init_from={saved_model('nanogpt')}", "--position=alibi"]
    assert "trained with --position learned, and --position alibi" in refused(train.main, *flags, *source)
    source = [f"--init_from={saved_model('nanogpt', position='alibi')}"]
    assert "--position learned is another" in refused(train.main, *flags, *source, "--position=learned")
    assert "is not a GPT-2" in refused(train.main, *flags, *source, "--implementation=mingpt")
    assert not (tmp_path / "run").exists()
    for block, word in ((6, "cropped"), (30, "extended")):
        train.main([*flags, *source, f"--block_size={block}", f"--out_dir={tmp_path / str(block)}"])
        assert f"block 12 {word} to {block}" in capsys.readouterr().out
    for wrong, have in (("--position learned", "position is alibi"), ("--block_size 8", "block_size is 6")):
        err = refused(train.main, f"--resume={tmp_path / '6'}", "--max_steps=4", *wrong.split())
        assert f"{wrong} contradicts" in err and f"whose {have}" in err


@pytest.mark.parametrize("flags", [ALIBI, [*ALIBI, "--attention=manual"], [*NANO, "--attention=manual"]], ids=" ".join)
def test_pretrained_embeddings_stay_frozen(flags, tiny_flags, text_file, tmp_path, capsys):
    matrix = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    np.save(tmp_path / "wte.npy", matrix)
    flags = [*tiny_flags, *flags, f"--data={text_file}", f"--pretrained_embeddings={tmp_path / 'wte.npy'}"]
    train.main([*flags, "--freeze_embeddings", f"--out_dir={tmp_path / 'run'}", "--max_steps=2"])
    train.main([f"--resume={tmp_path / 'run'}", "--max_steps=4"])
    trained = open_checkpoint(find_checkpoint(str(tmp_path / "run"), which="last"))
    assert torch.equal(trained.weight("transformer.wte.weight"), torch.from_numpy(matrix))
    assert "embedding " in capsys.readouterr().out and trained.step == 4


def losses(capsys, *flags) -> list[str]:
    """Train, and return the printed lines of the validations."""
    train.main([*flags])
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_alibi_training_unchanged_by_compile_recompute_and_kernel(tiny_flags, text_file, tmp_path, capsys):
    flags = [*tiny_flags, *ALIBI, "--n_head=4", "--n_layer=2", f"--data={text_file}"]
    ways = (
        [],
        ["--compile=aot_eager"],
        ["--recompute"],
        ["--recompute", "--compile=aot_eager"],
        ["--attention=manual"],
    )
    found = [losses(capsys, *flags, *way, f"--out_dir={tmp_path / str(n)}") for n, way in enumerate(ways)]
    assert len(found[0]) == 2 and all(lines == found[0] for lines in found)
    assert losses(capsys, *flags, "--position=learned", f"--out_dir={tmp_path / 'learned'}") != found[0]


def planned(capsys, *flags) -> dict[str, str]:
    train.main([*flags, "--dry_run"])
    return {line[:16].strip(): line[16:].strip() for line in capsys.readouterr().out.splitlines()}


def test_dry_run_counts_positions_and_bias(text_file, capsys):
    flags = [*NANO, "--model_type=gpt-mini", "--block_size=512", f"--data={text_file}", "--gpus=1", "--precision=bf16"]
    learned, alibi, flash = (
        planned(capsys, *flags, *more) for more in ([], ["--position=alibi"], ["--attention=flash"])
    )
    count = {name: int(said["parameters"].replace(",", "")) for name, said in (("l", learned), ("a", alibi))}
    assert count["l"] - count["a"] == 512 * 192
    memory = {
        name: float(said["activations"].split()[0].replace(",", "")) for name, said in (("l", learned), ("a", alibi))
    }
    assert abs(memory["a"] - memory["l"]) < 20 and flash == learned  # one bias is 6 x 512 x 512


@pytest.mark.slow
def test_alibi_loss_does_not_rise_with_longer_contexts(tmp_path, capsys):
    """Compare the losses at half, 1, 2 and 4 times the trained length, with windows that do not overlap."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), size=draw.integers(2, 6))) for _ in range(40)]
    lines = [" ".join(words[i] for i in draw.zipf(1.3, 8) % 40) for _ in range(3000)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    flags = "--n_layer=2 --n_head=4 --n_embd=64 --block_size=32 --batch_size=16 --max_steps=400 --learning_rate=3e-3"
    train.main(
        [
            *ALIBI,
            *TINY,
            *flags.split(),
            "--eval_interval=400",
            f"--data={tmp_path / 'text.txt'}",
            f"--out_dir={tmp_path / 'run'}",
        ]
    )
    found = {}
    for size in (16, 32, 64, 128):
        options = [f"--checkpoint={tmp_path / 'run'}", f"--block_size={size}", "--accelerator=cpu"]
        found[size] = score(parse_evaluate(options)).scores[0].loss
    assert max(found[64], found[128]) <= found[32] < found[16]


# Flash


def test_flash_is_refused_where_unavailable(tiny_flags, text_file, tmp_path, refused):
    flags = [*tiny_flags, *NANO, "--attention=flash", f"--data={text_file}", f"--out_dir={tmp_path / 'run'}"]
    for more, words in (
        (["--precision=bf16"], "not bfloat16 on cpu; use --attention sdpa"),
        (
            ["--accelerator=gpu", "--devices=1", "--precision=32-true", "--dry_run"],
            "not float32 on cuda; use --attention sdpa",
        ),
        (["--position=alibi"], "attention=flash is not available with position=alibi"),
        (["--n_embd=512"], "heads of up to 256"),
    ):
        assert words in refused(train.main, *flags, *more)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="needs a GPU .* not float32 on cpu"):
        model_of(attention="flash")(tokens())


def test_flash_checkpoint_is_scored_and_sampled_on_a_cpu(saved_model, tmp_path, capsys, refused):
    data = tmp_path / "letters.txt"
    data.write_text("abc\n " * 200)
    flash, plain = saved_model("nanogpt", attention="flash").rename(tmp_path / "flash.ckpt"), saved_model("nanogpt")
    options = [f"--data={data}", "--accelerator=cpu"]
    scores = score(parse_evaluate(["--checkpoint", str(flash), str(plain), *options])).scores
    said = capsys.readouterr().err.splitlines()
    assert scores[0].loss == scores[1].loss
    assert len(said) == 1 and "flash.ckpt: " in said[0] and said[0].endswith("; computed with --attention sdpa")
    texts = []
    for path in (flash, plain):
        sample.main([f"--checkpoint={path}", "--prompt=ab", "--max_new_tokens=20", "--accelerator=cpu"])
        out, err = capsys.readouterr()
        texts.append(out)
        assert ("computed with --attention sdpa" in err) == (path == flash)
    assert texts[0] == texts[1]
    err = refused(train.main, *TINY, f"--init_from={flash}", *options, f"--out_dir={tmp_path / 'run'}")
    assert "use --attention sdpa" in err
    train.main([*TINY, f"--init_from={flash}", *options, f"--out_dir={tmp_path / 'run'}", "--attention=sdpa"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's reasons for rejecting kernels
def test_flash_uses_no_other_kernel():
    """Use the CPU's flash kernel, which has no dropout: sdpa falls back to another kernel, flash must not."""
    x = tokens()[..., None].expand(-1, -1, C).float()
    made = {
        name: CausalSelfAttention(GPTConfig(n_embd=C, n_head=4, dropout=0.5, attention=name))
        for name in ("sdpa", "flash")
    }
    assert made["sdpa"](x).shape == x.shape
    with pytest.raises(RuntimeError, match="No available kernel"):
        made["flash"](x)
    made["flash"].load_state_dict(made["sdpa"].state_dict())
    outputs = [attention.eval()(x) for attention in made.values()]
    torch.testing.assert_close(*outputs)


def test_flash_cached_step_equals_manual(monkeypatch):
    """Use the CPU's flash kernel; it also takes the mask of rows of different lengths, which a GPU's does not."""
    monkeypatch.setattr(GPT, "refuses", lambda *_: None)
    for lengths in (None, torch.tensor([2, 4, 1])):
        found = []
        for attention in ("flash", "manual"):
            model = model_of(attention=attention)
            cache = Cache(S, lengths)
            with torch.no_grad():
                found.append([model(idx, cache=cache)[0] for idx in (tokens(4), tokens(1), tokens(1))])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields",
    [{"attention": "flash"}, {"position": "alibi"}, {"position": "alibi", "dropout": 0.0, "n_head": 3}],
    ids=str,
)
def test_half_precision_on_a_gpu_is_close_to_manual(fields):
    """Compare flash, and ALiBi by FlexAttention, with manual attention: values, gradients and cached steps."""
    sizes = {"block_size": 256, "n_embd": 96}
    exact = model_of(**(sizes | fields | {"attention": "manual"})).cuda()
    quick = model_of(**(sizes | fields)).cuda()
    idx, found = tokens(256).cuda(), []
    for model, half in ((exact, False), (quick, True)):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            logits, loss = model(idx, idx.roll(1, 0))
            cache = Cache(256)
            steps = [model(part, cache=cache)[0].float() for part in (idx[:, :100], idx[:, 100:101], idx[:, 101:102])]
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append(
            (logits.float().softmax(-1), loss.float(), gradients / gradients.norm(), torch.cat(steps).softmax(-1))
        )
    torch.testing.assert_close(*found, rtol=0, atol=1e-2)


@pytest.mark.gpu
def test_alibi_on_a_gpu_allocates_no_bias():
    model = model_of(position="alibi", block_size=4096, n_embd=96).cuda()
    idx = tokens(4096, B=1).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        model(idx)
    assert torch.cuda.max_memory_allocated() - before < 6 * 4096 * 4096 * 2
