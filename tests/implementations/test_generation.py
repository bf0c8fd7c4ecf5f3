"""Generation: same tokens with and without the cache, drawn from the right distribution, for any model and prompts."""

import inspect
import math

import pytest
import torch
from torch import nn

from lightning_gpt import GPTModule
from lightning_gpt.implementations.cache import Cache, accepts_cache
from lightning_gpt.implementations.generation import GenerationSettings, draw, generate_tokens, penalise, warp
from lightning_gpt.implementations.registry import get_implementation

VOCAB, BLOCK = 37, 12
CPU = torch.device("cpu")
EVERY_OPTION = {"n_kv_head": 1, "window": 5, "bigram": 101, "smear": True, "n_layer": 3}
MODELS = {
    **{f"{name}-{how}": (name, {"attention": how}) for name in ("mingpt", "nanogpt") for how in ("sdpa", "manual")},
    **{
        f"alibi-{how}": ("nanogpt", {"attention": how, "position": "alibi", "n_layer": 3}) for how in ("sdpa", "manual")
    },
    "moderngpt": ("moderngpt", EVERY_OPTION),
}


def model_of(name, *, block_size=BLOCK, vocab_size=VOCAB, **fields):
    """Build a model in eval mode whose next token depends on its whole input."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": block_size, "vocab_size": vocab_size}
    torch.manual_seed(0)
    model = get_implementation(name).build(sizes | fields)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.6 if parameter.dim() == 2 else 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name, fields = MODELS[request.param]
    return model_of(name, **fields)


class Plain(nn.Module):
    """Wrap a model's forward, without its other methods, and record the shapes of the inputs."""

    def __init__(self, model):
        super().__init__()
        self.model, self.read = model, []

    def forward(self, idx, targets=None):
        self.read.append(tuple(idx.shape))
        return self.model(idx, targets)


def prompts_of(lengths):
    draw_from = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=draw_from).tolist() for n in lengths]


def rows(model, prompts, settings, **options):
    """Return the new tokens of each row."""
    new = [[] for _ in prompts]
    sizes = {"block_size": BLOCK, "vocab_size": VOCAB, "device": CPU} | options
    for step in generate_tokens(model, prompts, settings, **sizes):
        for row, token in step:
            new[row].append(token)
    return new


def original_loop(model, prompt, steps, *, vocab_size=VOCAB):
    """Generate as minGPT and nanoGPT do when greedy: read the whole window again for each new token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(torch.tensor([text[-BLOCK:]]))[0][0, -1, :vocab_size]
            text.append(int(logits.argmax()))
    return text[len(prompt) :]


def test_head_reads_only_the_last_position(model):
    idx, read = torch.tensor(prompts_of([BLOCK, BLOCK])), []
    hook = model.lm_head.register_forward_hook(lambda head, args, y: read.append(y.size(1)))
    with torch.no_grad():
        logits = model(idx, cache=Cache(BLOCK))[0]
        all_logits = model(idx, idx)[0]
    hook.remove()
    assert read == [1, BLOCK]
    torch.testing.assert_close(logits, all_logits[:, -1:], rtol=1e-5, atol=1e-4)


LENGTHS = [[1], [5], [BLOCK], [BLOCK + 5], [4, 4, 4], [2] * 7, [1, 7, 3], [1, BLOCK, BLOCK - 1, BLOCK + 9, 5, 5]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_greedy_tokens_equal_the_original_loop(model, lengths):
    prompts = prompts_of(lengths)
    found = rows(model, prompts, GenerationSettings(max_new_tokens=3 * BLOCK, greedy=True))
    assert found == [original_loop(model, prompt, 3 * BLOCK) for prompt in prompts]
    assert len({token for row in found for token in row}) > 2  # not the same token forever


def test_model_generate_equals_the_original_loop(model):
    if not hasattr(model, "generate"):
        pytest.skip("this model leaves it to GPTModule.generate")
    prompts = prompts_of([3, 3])
    found = model.generate(torch.tensor(prompts), 3 * BLOCK, do_sample=False)
    assert found.tolist() == [prompt + original_loop(model, prompt, 3 * BLOCK) for prompt in prompts]


@pytest.mark.parametrize("lengths", [[6, 6], [2, 6, 4]], ids=str)
def test_cached_logits_equal_those_of_a_full_forward(model, lengths):
    texts = prompts_of(lengths)
    cache = Cache(BLOCK, None if min(lengths) == max(lengths) else torch.tensor(lengths))
    idx = torch.tensor([text + [VOCAB - 1] * (6 - len(text)) for text in texts])
    for step in range(BLOCK - 6 + 1):
        with torch.no_grad():
            logits = model(idx, cache=cache)[0]
            assert logits.shape == (len(texts), 1, VOCAB)
            for row, text in enumerate(texts):
                torch.testing.assert_close(logits[row, 0], model(torch.tensor([text]))[0][0, -1], atol=1e-5, rtol=1e-5)
        if step == 2:  # drop the rows that have ended
            cache.keep([1])
            texts = texts[1:2]
        texts = [[*text, (7 * step + row) % VOCAB] for row, text in enumerate(texts)]
        idx = torch.tensor([text[-1:] for text in texts])
    with pytest.raises(ValueError, match=f"holds {BLOCK} of {BLOCK} tokens"):
        model(idx, cache=cache)


def test_cache_takes_one_token_at_a_time_after_the_prompt(model):
    cache = Cache(BLOCK)
    model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="one token at a time, not 2"):
        model(torch.tensor([[3, 4]]), cache=cache)
    assert cache.length == 2


def test_accepts_cache_detects_the_parameter(model):
    assert accepts_cache(model)
    assert not accepts_cache(Plain(model))


class Cached(Plain):
    """The same wrapper for a model that accepts a cache."""

    def forward(self, idx, targets=None, *, cache=None):
        self.read.append(tuple(idx.shape))
        return self.model(idx, targets, cache=cache)


@pytest.mark.parametrize("lengths", [[5, 5], [5, 2, 4]], ids=str)
def test_cached_step_reads_one_token_per_row(model, lengths):
    prompts, settings = prompts_of(lengths), GenerationSettings(max_new_tokens=4, greedy=True)
    reader = Cached(model)
    assert rows(reader, prompts, settings) == [original_loop(model, prompt, 4) for prompt in prompts]
    B = len(lengths)
    assert reader.read == [(B, 5), (B, 1), (B, 1), (B, 1)]


def test_model_without_cache_reads_unpadded_windows(model):
    prompts, settings = prompts_of([3, 1, 3, BLOCK + 3]), GenerationSettings(max_new_tokens=2, greedy=True)
    plain = Plain(model)
    assert rows(plain, prompts, settings) == rows(model, prompts, settings)
    assert plain.read == [(2, 3), (1, 1), (1, BLOCK), (2, 4), (1, 2), (1, BLOCK)]


def test_batched_rows_equal_single_rows(model):
    prompts = prompts_of([4, 2, 9])
    settings = GenerationSettings(max_new_tokens=20, top_k=9, repetition_penalty=1.2, seed=3)
    together = rows(model, prompts, settings)
    for row, prompt in enumerate(prompts):
        alone = GenerationSettings(max_new_tokens=20, top_k=9, repetition_penalty=1.2, seed=3 + row)
        assert rows(model, [prompt], alone) == [together[row]]


def test_seed_repeats_draws_and_keeps_the_global_state(model):
    state, prompts = torch.get_rng_state(), [[1, 2, 3]] * 2
    first, again, other = (rows(model, prompts, GenerationSettings(max_new_tokens=15, seed=s)) for s in (5, 5, 6))
    assert first == again and first[0] != first[1]
    assert other[0] == first[1] and other != first  # row r uses seed + r
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("top_k", [None, 4])
def test_first_draws_follow_the_softmax(top_k):
    """Test 20,000 first tokens by chi-squared against the softmax of logits / temperature over the top_k."""
    model, prompt, n = model_of("nanogpt", vocab_size=8), [1, 5, 2], 20_000
    logits = model(torch.tensor([prompt]))[0][0, -1].detach() / 6
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -math.inf
    expected = logits.double().softmax(-1) * n
    settings = GenerationSettings(max_new_tokens=1, temperature=6, top_k=top_k, seed=11)
    drawn = rows(model, [prompt] * n, settings, vocab_size=8)
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=8)
    possible = expected > 0
    assert counts[~possible].sum() == 0 and expected[possible].min() > 5
    chi_squared = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi_squared < {8: 24.3, 4: 16.3}[int(possible.sum())]  # 0.1 % quantiles for 7 and 3 degrees of freedom


def test_second_draws_follow_the_softmax():
    """Test pairs of tokens by chi-squared: the second draw is independent of the first."""
    model, n = model_of("mingpt", vocab_size=3), 12_000
    drawn = torch.tensor(rows(model, [[1]] * n, GenerationSettings(max_new_tokens=2, temperature=6), vocab_size=3))
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    with torch.no_grad():
        first = model(torch.tensor([[1]]))[0][0, -1].div(6).softmax(-1)
        second = model(torch.tensor([[1, token] for token in range(3)]))[0][:, -1].div(6).softmax(-1)
    expected = (first[:, None] * second).flatten() * n
    assert expected.min() > 5
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1  # 0.1 % quantile for 8 degrees of freedom


def test_draw_maps_a_number_to_its_token():
    logits = torch.tensor([[-math.inf, math.log(0.25), math.log(0.75), -math.inf]])
    for number, token in ((0.0, 1), (0.2499, 1), (0.2501, 2), (1 - 2**-53, 2)):
        assert draw(logits, torch.tensor([number], dtype=torch.float64)).tolist() == [token]


def test_processors_match_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits, ids = 3 * torch.randn(50, 200), torch.randint(200, (50, 30))
    seen = torch.zeros(50, 200, dtype=torch.bool).scatter(1, ids, True)
    settings = GenerationSettings(max_new_tokens=1, temperature=0.7, top_k=60, top_p=0.8, repetition_penalty=1.3)
    expected = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(60),
            transformers.TopPLogitsWarper(0.8),
        ]
    )(ids, logits.clone())
    found = warp(penalise(logits, seen, penalty=1.3), settings)
    torch.testing.assert_close(found, expected)
    assert 1 <= found.isfinite().sum(-1).min() and found.isfinite().sum(-1).max() < 60  # top_k and top_p both cut
    narrow = warp(logits, GenerationSettings(max_new_tokens=1, top_p=1e-6))
    assert torch.equal(narrow.isfinite().nonzero()[:, 1], logits.argmax(-1))


def test_repetition_penalty_covers_prompt_and_new_tokens(model):
    prompts = [[3, 3, 8, 1, 20], [2]]
    found = rows(model, prompts, GenerationSettings(max_new_tokens=BLOCK, greedy=True, repetition_penalty=1.7))
    for prompt, new in zip(prompts, found, strict=True):
        text = list(prompt)
        for token in new:
            with torch.no_grad():
                logits = model(torch.tensor([text[-BLOCK:]]))[0][0, -1]
            for seen in set(text):
                logits[seen] = logits[seen] * 1.7 if logits[seen] < 0 else logits[seen] / 1.7
            assert token == int(logits.argmax())
            text.append(token)
    assert found != rows(model, prompts, GenerationSettings(max_new_tokens=BLOCK, greedy=True))


def test_stop_token_ends_only_its_row(model):
    prompts = prompts_of([3, 5, 1])
    free = GenerationSettings(max_new_tokens=2 * BLOCK, seed=4)
    whole = rows(model, prompts, free)
    stop = whole[0][6]
    found = rows(model, prompts, GenerationSettings(max_new_tokens=2 * BLOCK, seed=4, stop_tokens=(stop,)))
    assert found == [row[: row.index(stop)] if stop in row else row for row in whole]
    assert len(found[0]) <= 6 and len(set(map(len, found))) > 1


def test_finished_rows_are_not_read(model):
    plain = Plain(model)
    settings = GenerationSettings(max_new_tokens=5, greedy=True)
    found = rows(plain, prompts_of([2, 2, 2]), settings, is_over=lambda row, token: row != 1)
    assert [len(row) for row in found] == [1, 5, 1]
    assert plain.read == [(3, 2), (1, 3), (1, 4), (1, 5), (1, 6)]


@pytest.mark.parametrize("name", ["mingpt", "nanogpt"])
def test_vocabulary_padding_is_never_sampled(name):
    fields = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 64, "block_size": 8, "vocab_padding": 60}
    module = GPTModule(name, model_config=fields).eval()
    for settings in ({"do_sample": True, "seed": 0, "temperature": 9.0}, {"do_sample": False}):
        assert module.generate(torch.zeros(20, 1, dtype=torch.long), 20, **settings).max() < 4


@pytest.mark.parametrize("name", ["mingpt", "nanogpt"])
def test_module_generates_as_its_model(name):
    fields = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": VOCAB, "block_size": BLOCK}
    module = GPTModule(name, model_config=fields, compile="eager").eval()
    idx = torch.tensor(prompts_of([4, 4]))
    greedy = module.model.generate(idx, 2 * BLOCK, do_sample=False)
    assert torch.equal(module.generate(idx, 2 * BLOCK, do_sample=False), greedy)
    does_sample = inspect.signature(module.model.generate).parameters["do_sample"].default
    assert torch.equal(module.generate(idx, 2 * BLOCK), greedy) is not does_sample
    torch.manual_seed(3)
    first = module.generate(idx, 20, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(module.generate(idx, 20, do_sample=True), first)  # without a seed, torch's global one decides
    assert torch.equal(module.generate(idx, 0), idx)


@pytest.mark.parametrize("name", ["mingpt", "nanogpt"])
def test_predict_returns_all_positions_or_the_last(name):
    fields = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": VOCAB, "block_size": BLOCK}
    module = GPTModule(name, model_config=fields).eval()
    idx = torch.tensor(prompts_of([6, 6]))
    expected = module.model(idx, idx)[0].detach()
    for predict in (module.predict, module.model.predict):
        torch.testing.assert_close(predict(idx, targets=True), expected)
        torch.testing.assert_close(predict(idx, targets=False), expected[:, -1:])
        assert predict(idx).shape == (2, 6, VOCAB) and not predict(idx).requires_grad


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}]
)
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GenerationSettings(max_new_tokens=1, **wrong)


def test_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        rows(model, [[1], []], GenerationSettings(max_new_tokens=1))
