"""End-to-end memory network (Sukhbaatar et al. 2015), which Table 4 compares with on bAbI.

It has no recurrent cell: it attends to the sentences of a story, several hops long.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells import StoryLayout, WholeConfig, register_model
from rum.checks import check_at_least, check_probability
from rum.errors import ConfigError

INITIAL_STD = 0.1


class MemoryNetwork(nn.Module):
    """From a story and a question to logits of the answer.

    ```
    m_i = sum_j l_j * A x_ij + T_A(i)        memory of sentence i, the most recent is i = 0
    c_i = sum_j l_j * C x_ij + T_C(i)        what it answers with
    u   = sum_j l_j * B q_j                  question
    p   = softmax_i(u . m_i)                 one hop
    u   = u + sum_i p_i c_i
    logits = u C_K'                          after K hops
    ```

    Adjacent weight tying: A of hop k + 1 is C of hop k, B is A of hop 1, the read-out is C of the
    last hop. `l_kj = (1 - j / J) - (k / d) (1 - 2 j / J)` is the position encoding of word j of J
    in feature k of d. The blank (0) and the mark that ends a sentence are no words. In training
    every sentence is followed by an empty memory with probability `random_empty`, which keeps the
    temporal encodings T from being learned by heart. Without any sentence the question alone
    answers.

    Called as `logits, state = model(symbols, state)`: symbols `(T, B)` as
    `rum.cells.StoryLayout` says, logits `(1, B, num_classes)`, the state is empty.

    Source: Sukhbaatar et al. 2015 (End-To-End Memory Networks), sections 2, 3.1 and 4.1. Left out:
    the schedule that starts without the softmax (`linear` removes it for a whole run).
    """

    def __init__(
        self,
        vocab_size: int,
        story: StoryLayout,
        *,
        embedding_size: int = 20,
        num_hops: int = 3,
        memory_size: int = 50,
        position_encoding: bool = True,
        random_empty: float = 0.1,
        linear: bool = False,
    ) -> None:
        """See `MemN2NConfig` for the options.

        Args:
            vocab_size: Number of symbols, and of answers.
            story: Where the question lies and what ends a sentence.
        """
        super().__init__()
        self.story = story
        self.memory_size = memory_size
        self.position_encoding = position_encoding
        self.random_empty = random_empty
        self.linear = linear
        self.embeddings = nn.ModuleList(
            nn.Embedding(vocab_size, embedding_size, padding_idx=0) for _ in range(num_hops + 1)
        )
        self.temporal = nn.ParameterList(
            nn.Parameter(torch.empty(memory_size, embedding_size)) for _ in range(num_hops + 1)
        )
        with torch.no_grad():
            for embedding, temporal in zip(self.embeddings, self.temporal, strict=True):
                assert isinstance(embedding, nn.Embedding)
                embedding.weight.normal_(0.0, INITIAL_STD)
                embedding.weight[0].zero_()
                nn.init.normal_(temporal, 0.0, INITIAL_STD)

    def forward(
        self, symbols: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Answers; see the class for shapes."""
        split = len(symbols) - self.story.question_length
        if split < 0:
            raise ValueError(
                f"symbols must hold a question of {self.story.question_length}, got shape "
                f"{tuple(symbols.shape)}"
            )
        story, question = symbols[:split], symbols[split:]
        sentences = _sentences(story, self.story.sentence_ends)
        slots, num_slots = self._slots(sentences)
        used = int(num_slots.max()) if num_slots.numel() else 0
        attended = torch.arange(used, device=symbols.device) < num_slots.unsqueeze(1)
        question = question.t()
        attention = (self.embeddings[0](question) * self._weights(question)).sum(-2)
        words = _packed(story, sentences, slots, used)
        weights = self._weights(words)
        memory = self._memory(0, words, weights)
        for hop in range(len(self.embeddings) - 1):
            answer = self._memory(hop + 1, words, weights)
            score = (memory @ attention.unsqueeze(-1)).squeeze(-1)
            if self.linear:
                weight = score.masked_fill(~attended, 0.0)
            else:  # a row without a sentence would be a softmax over nothing
                score = score.masked_fill(~attended, torch.finfo(score.dtype).min)
                weight = score.softmax(-1).masked_fill(~attended, 0.0)
            attention = attention + (weight.unsqueeze(1) @ answer).squeeze(1)
            memory = answer  # adjacent tying
        last = self.embeddings[-1]
        assert isinstance(last, nn.Embedding)
        return F.linear(attention, last.weight).unsqueeze(0), ()

    def _slots(self, sentences: "_Sentences") -> tuple[Tensor, Tensor]:
        """The memory of each word's sentence `(S, B)`, and how many memories there are `(B,)`."""
        batch = sentences.number.shape[1]
        before = sentences.number.new_zeros(batch, self.memory_size + 1)
        if self.training and self.random_empty:
            draw = torch.rand(batch, self.memory_size, device=sentences.device)
            before[:, 1:] = (draw < self.random_empty).cumsum(1)
        known = sentences.number.clamp(0, self.memory_size)
        shift = before.gather(1, known.t()).t()
        total = sentences.count.clamp(max=self.memory_size)
        num_slots = total + before.gather(1, total.unsqueeze(1)).squeeze(1)
        return sentences.number + shift, num_slots.clamp(max=self.memory_size)

    def _memory(self, index: int, words: Tensor, weights: Tensor) -> Tensor:
        """Packed sentences by one of the embeddings: `(B, memories, d)`."""
        embedded: Tensor = self.embeddings[index](words)
        temporal: Tensor = self.temporal[index][: words.shape[1]]
        return (embedded * weights).sum(-2) + temporal

    def _weights(self, words: Tensor) -> Tensor:
        """Of the words of sentences `(..., J)` in a sum: `(..., J, 1 or d)`, 0 for blanks (0)."""
        like: Tensor = self.temporal[0]
        is_word = words != 0
        if not self.position_encoding:
            return is_word.unsqueeze(-1).to(like.dtype)
        size = like.shape[-1]
        feature = torch.arange(1, size + 1, device=like.device, dtype=like.dtype) / size
        position = is_word.cumsum(-1).to(like.dtype)
        place = (position / is_word.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        weights: Tensor = (1 - place) - feature * (1 - 2 * place)
        return weights * is_word.unsqueeze(-1)


@dataclass(frozen=True)
class _Sentences:
    """For every symbol of a story `(S, B)`, where it stands."""

    is_word: Tensor
    number: Tensor
    """Of its sentence, 0 for the most recent."""
    position: Tensor
    """Among the words of its sentence, from 1."""
    count: Tensor
    """`(B,)`: sentences of the story."""

    @property
    def device(self) -> torch.device:
        return self.number.device


def _sentences(story: Tensor, ends: tuple[int, ...]) -> _Sentences:
    """Splits stories at the marks that end a sentence; the last one need not have one."""
    is_end = torch.isin(story, torch.tensor(ends, device=story.device))
    is_word = (story != 0) & ~is_end
    ends_after = is_end.flip(0).long().cumsum(0).flip(0)  # this symbol's own counts
    count = is_end.sum(0)
    if len(story):
        open_end = is_word[-1].long()
        number, count = ends_after - 1 + open_end, count + open_end
    else:
        number = ends_after
    words_so_far = is_word.long().cumsum(0)
    last = int(count.max()) if count.numel() else 0
    per_sentence = torch.zeros(last + 1, story.shape[1], dtype=torch.long, device=story.device)
    per_sentence.scatter_add_(0, number.clamp(min=0), is_word.long())
    # words of all earlier sentences: those of the sentence itself and of later ones taken away
    from_here = per_sentence.cumsum(0).gather(0, number.clamp(min=0))
    position = words_so_far - (is_word.sum(0) - from_here)
    return _Sentences(is_word, number, position, count)


def _packed(story: Tensor, sentences: _Sentences, slots: Tensor, memories: int) -> Tensor:
    """The words of each memory, padded with 0: `(B, memories, longest sentence)`.

    No two words go to one place, so the result is the same on every device.
    """
    kept = sentences.is_word & (slots < memories)
    position = sentences.position * kept
    longest = int(position.max()) if position.numel() else 0
    packed = story.new_zeros(story.shape[1], memories, longest + 1)
    if not memories:
        return packed
    row = torch.arange(story.shape[1], device=story.device)
    # place 0 takes all that is not kept: blanks
    packed[row, slots.clamp(0, memories - 1), position] = story * kept
    return packed[..., 1:]


@register_model
@dataclass(kw_only=True)
class MemN2NConfig(WholeConfig):
    """An end-to-end memory network; the defaults are those of one model per bAbI task."""

    name: str = "memn2n"
    embedding_size: int = 20
    """d; 50 where the tasks are learned jointly."""
    num_hops: int = 3
    """K, >= 1."""
    memory_size: int = 50
    """The most recent sentences, empty memories included, that are attended to."""
    position_encoding: bool = True
    """Weight words by their place in the sentence; off sums them as a bag."""
    random_empty: float = 0.1
    """Probability of an empty memory after a sentence, in training."""
    linear: bool = False
    """Attend without a softmax."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the model does not accept."""
        super().__post_init__()
        for name in ("embedding_size", "num_hops", "memory_size"):
            check_at_least(name, getattr(self, name), 1)
        check_probability("random_empty", self.random_empty)

    def build_model(
        self, *, vocab_size: int, num_classes: int, story: StoryLayout
    ) -> MemoryNetwork:
        """Builds the network."""
        if num_classes != vocab_size:
            raise ConfigError(
                "memn2n answers with symbols of the story: the task must have as many classes as "
                f"symbols, got {num_classes} and {vocab_size}"
            )
        return MemoryNetwork(
            vocab_size,
            story,
            embedding_size=self.embedding_size,
            num_hops=self.num_hops,
            memory_size=self.memory_size,
            position_encoding=self.position_encoding,
            random_empty=self.random_empty,
            linear=self.linear,
        )
