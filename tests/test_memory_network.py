"""The end-to-end memory network against loops over samples, sentences and words."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from rum.cells import StoryLayout
from rum.errors import ConfigError
from rum.memory_network import MemN2NConfig, MemoryNetwork, _sentences
from rum.models import ModelSizes, build_model, count_parameters
from rum.tasks import CopyingConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


END, QUESTION_LENGTH, VOCAB = 1, 4, 9
STORIES = [
    ([[3, 4], [5, 6, 7]], [8, 2]),
    ([[3]], [4, 5, 6]),
    ([], [7]),
    ([[2, 3], [4, 5], [6, 7], [8, 2], [3, 4, 5, 6]], [3, 4, 5, 6]),
    ([[2, 2, 2]], []),
]


def encode(stories: list[tuple[list[list[int]], list[int]]], length: int = 20) -> torch.Tensor:
    columns = []
    for sentences, question in stories:
        story = [word for sentence in sentences for word in (*sentence, END)]
        padded = [0] * (length - len(story)) + story
        columns.append(padded + question + [0] * (QUESTION_LENGTH - len(question)))
    return torch.tensor(columns).t()


def network(**options: object) -> MemoryNetwork:
    torch.manual_seed(1)
    model = MemoryNetwork(
        VOCAB,
        StoryLayout(QUESTION_LENGTH, (END,)),
        embedding_size=5,
        **options,  # type: ignore[arg-type]
    )
    return model.double().eval()


def by_hand(model: MemoryNetwork, sentences: list[list[int]], question: list[int]) -> np.ndarray:
    tables = [e.weight.detach().numpy() for e in model.embeddings]  # type: ignore[union-attr]
    times = [t.detach().numpy() for t in model.temporal]
    size = tables[0].shape[1]

    def encoded(words: list[int], table: np.ndarray) -> np.ndarray:
        total = np.zeros(size)
        for j, word in enumerate(words, 1):
            for k in range(size):
                weight = 1.0
                if model.position_encoding:
                    place = j / len(words)
                    weight = (1 - place) - (k + 1) / size * (1 - 2 * place)
                total[k] += weight * table[word][k]
        return total

    recent = sentences[::-1][: model.memory_size]
    u = encoded(question, tables[0])
    for hop in range(len(tables) - 1):
        m = [encoded(s, tables[hop]) + times[hop][i] for i, s in enumerate(recent)]
        c = [encoded(s, tables[hop + 1]) + times[hop + 1][i] for i, s in enumerate(recent)]
        if recent:
            scores = np.array([u @ each for each in m])
            p = scores if model.linear else np.exp(scores) / np.exp(scores).sum()
            u = u + sum(pi * ci for pi, ci in zip(p, c, strict=True))
    return tables[-1] @ u


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_hops": 1},
        {"memory_size": 2},
        {"memory_size": 1, "num_hops": 2},
        {"position_encoding": False},
        {"linear": True},
    ],
    ids=str,
)
def test_answers_are_those_of_the_equations(options: dict[str, object]) -> None:
    model = network(**options)
    with torch.no_grad():
        logits, state = model(encode(STORIES))
    assert state == ()
    assert logits.shape == (1, len(STORIES), VOCAB)
    for column, (sentences, question) in enumerate(STORIES):
        expected = by_hand(model, sentences, question)
        np.testing.assert_allclose(logits[0, column].numpy(), expected, rtol=0, atol=1e-10)


def test_the_last_fifty_sentences_are_remembered_whatever_their_length() -> None:
    generator = np.random.default_rng(6)
    stories = []
    for count in (49, 50, 51, 120, 1):
        lengths = generator.choice([0, 1, 2, 9], size=count)  # "..": a sentence without a word
        sentences = [generator.integers(2, VOCAB, size=n).tolist() for n in lengths]
        stories.append((sentences, [3, 4]))
    model = network()
    input = encode(stories, length=700)
    with torch.no_grad():
        logits, _ = model(input)
    for column, (sentences, question) in enumerate(stories):
        expected = by_hand(model, sentences, question)
        np.testing.assert_allclose(logits[0, column].numpy(), expected, rtol=0, atol=1e-10)
    # and nothing before them: the same without the first 70 of 120
    shorter, _ = model(encode([(stories[3][0][-50:], [3, 4])], length=700))
    torch.testing.assert_close(shorter[0, 0], logits[0, 3], rtol=0, atol=1e-12)


def test_the_last_sentence_need_not_be_ended() -> None:
    model = network()
    ended = encode([STORIES[0]])
    length = len(ended) - QUESTION_LENGTH
    open_end = torch.cat((ended[: length - 1], ended[length:]))
    torch.testing.assert_close(model(open_end)[0], model(ended)[0], rtol=0, atol=1e-12)


def test_the_blank_is_no_word_even_where_reading_out_has_trained_its_row() -> None:
    model = network()
    before, _ = model(encode(STORIES))
    with torch.no_grad():
        for embedding in model.embeddings:
            embedding.weight[0] = 3.0  # type: ignore[union-attr, operator, index]
    after, _ = model(encode(STORIES))
    torch.testing.assert_close(after[..., 1:], before[..., 1:], rtol=0, atol=1e-12)


def test_padding_and_neighbours_do_not_change_an_answer() -> None:
    model = network()
    with torch.no_grad():
        together, _ = model(encode(STORIES))
        longer, _ = model(encode(STORIES, length=33))
        torch.testing.assert_close(together, longer, rtol=0, atol=1e-12)
        for column, story in enumerate(STORIES):
            alone, _ = model(encode([story]))
            torch.testing.assert_close(alone[0, 0], together[0, column], rtol=0, atol=1e-12)
        shortest, _ = model(encode([STORIES[1]], length=2))
        torch.testing.assert_close(shortest[0, 0], together[0, 1], rtol=0, atol=1e-12)
        no_story, _ = model(encode([STORIES[2]], length=0))
        torch.testing.assert_close(no_story[0, 0], together[0, 2], rtol=0, atol=1e-12)


def test_every_weight_gets_a_finite_gradient_and_the_blank_none() -> None:
    model = network(memory_size=5).train()
    logits, _ = model(encode(STORIES))
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0, name
    for embedding in list(model.embeddings)[:-1]:
        assert (embedding.weight[0] == 0).all()  # type: ignore[union-attr, operator]
        assert (embedding.weight.grad[0] == 0).all()  # type: ignore[union-attr]


def test_empty_memories_are_inserted_in_training_only() -> None:
    model = network(random_empty=0.5, memory_size=50)
    input = encode([STORIES[3]])
    with torch.no_grad():
        exact, _ = model(input)
        repeated, _ = model(input)
        assert torch.equal(exact, repeated)
        model.train()
        torch.manual_seed(2)
        drawn = [model(input)[0] for _ in range(20)]
        torch.manual_seed(2)
        again = [model(input)[0] for _ in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert sum(not torch.equal(each, exact) for each in drawn) > 10
    # with empty memories after the 1st and 2nd most recent: slots 0, 2, 4, 5, 6 of 7
    model.random_empty = 0.3
    sentences = _sentences(input[:-QUESTION_LENGTH], (END,))
    torch.manual_seed(3)
    draw = torch.rand(1, 50) < 0.3
    torch.manual_seed(3)
    slots, count = model._slots(sentences)
    before = draw[0].long().cumsum(0)
    for s in range(5):
        expected = s + (int(before[s - 1]) if s else 0)
        assert set(slots[(sentences.number == s) & sentences.is_word].tolist()) == {expected}
    assert count.item() == 5 + int(before[4])


def test_no_sum_depends_on_the_order_a_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().eval()
    expected, _ = model(encode(STORIES))

    def refuse(*_: object) -> None:
        raise AssertionError("sums in any order on CUDA")

    for name in ("index_add", "index_add_", "scatter_add", "scatter_reduce"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert torch.equal(model(encode(STORIES))[0], expected)


def test_importing_experiments_registers_the_model() -> None:
    code = "import rum.experiment; from rum.cells import MODELS; print(MODELS['memn2n'].__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MemN2NConfig"


def test_size_is_a_table_and_times_for_every_hop_and_one_more() -> None:
    model = network(num_hops=3, memory_size=7)
    assert count_parameters(model) == 4 * (VOCAB * 5 + 7 * 5)


def test_a_single_fact_is_learned() -> None:
    """`who where .` for four people; the question names one of them."""
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(5)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.randint(4, (size, 4), generator=generator)
        asked = torch.randint(4, (size,), generator=generator)
        stories = [
            ([[2 + who, 6 + int(place)] for who, place in enumerate(row)], [2 + int(who)])
            for row, who in zip(places, asked, strict=True)
        ]
        return encode(stories, length=12), 6 + places[torch.arange(size), asked]

    model = MemoryNetwork(10, StoryLayout(QUESTION_LENGTH, (END,)), num_hops=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(250):
        symbols, answers = batch(64)
        loss = torch.nn.functional.cross_entropy(model(symbols)[0][0], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    symbols, answers = batch(500)
    with torch.no_grad():
        hits = model.eval()(symbols)[0][0].argmax(-1) == answers
    assert hits.float().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hops": 0}, "num_hops must be an integer >= 1, got 0"),
        ({"memory_size": 0}, "memory_size must be an integer >= 1, got 0"),
        ({"embedding_size": -1}, "embedding_size must be an integer >= 1, got -1"),
        ({"random_empty": 1.0}, r"random_empty must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemN2NConfig(**options)  # type: ignore[arg-type]


def test_other_tasks_are_refused() -> None:
    task = CopyingConfig(delay=3).load(seed=0)
    sizes = ModelSizes(
        vocab_size=task.vocab_size,
        num_classes=task.num_classes,
        embedding_size=None,
        initialization="uniform",
    )
    with pytest.raises(ConfigError, match="memn2n answers questions about stories"):
        build_model(MemN2NConfig(), sizes)
    with pytest.raises(ConfigError, match="as many classes as symbols, got 10 and 9"):
        MemN2NConfig().build_model(num_classes=10, vocab_size=9, story=StoryLayout(3, (1,)))
