"""RULER's question answering (arXiv 2404.06654, section 3): SQuAD or HotpotQA among further documents.

``qa_1`` reads a file of SQuAD's format, 1.1 or 2.0, ``qa_2`` one of HotpotQA's. Distractors come from the
same article first, then from the rest of the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Item, Tokenizer, rng_of
from lt_sglang.eval.tasks.files import Record, read, whole
from lt_sglang.eval.tasks.ruler import BENCHMARK, too_few
from lt_sglang.eval.tasks.ruler_words import fitted

QA_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}
NEW_TOKENS = 32
QA = (
    "Answer the question by the documents below. Give the answer and no other word.\n\n{documents}\n\n"
    "Answer the question by the documents above. Give the answer and no other word.\n\n"
    "Question: {question}\nAnswer:"
)


@dataclass(frozen=True)
class Question:
    """text; its accepted answers; the documents that hold it; others of the same article."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    related: tuple[str, ...] = ()


def squad(path: str) -> list[Question]:
    """The questions of a file of SQuAD's that have an answer; raises LightTransferError."""
    questions = []
    for article in whole(path, "--squad").inner("data"):
        paragraphs = article.inner("paragraphs")
        contexts = [paragraph.get("context", str) for paragraph in paragraphs]
        for paragraph, context in zip(paragraphs, contexts, strict=True):
            related = tuple(dict.fromkeys(other for other in contexts if other != context))
            for asked in paragraph.inner("qas"):
                if asked.fields.get("is_impossible"):
                    continue
                answers = tuple(answer.get("text", str) for answer in asked.inner("answers"))
                questions.append(Question(asked.get("question", str), answers, (context,), related))
    return questions


def hotpotqa(path: str) -> list[Question]:
    """The questions of a file of HotpotQA's; raises LightTransferError."""
    return [
        Question(asked.get("question", str), (asked.get("answer", str),), _documents(asked))
        for asked in read(path, "--hotpotqa")
    ]


def _documents(asked: Record) -> tuple[str, ...]:
    try:
        return tuple(f"{title}\n{''.join(sentences)}" for title, sentences in asked.get("context", list))
    except (TypeError, ValueError):
        raise LightTransferError(
            f"{asked.where}: context: is not a list of a title and a list of sentences each"
        ) from None


@dataclass(frozen=True)
class QaTask:
    """``trials`` questions of a file among as many documents as fit into ``tokens`` tokens.

    name: one of QA_FILES. path: its file.
    """

    name: str
    tokens: int
    trials: int
    path: str
    seed: int = 0

    def items(self, tokenizer: Tokenizer) -> list[Item]:
        """The prompts; raises LightTransferError if the file has too few questions or documents."""
        questions = {"qa_1": squad, "qa_2": hotpotqa}[self.name](self.path)
        if len(questions) < self.trials:
            raise LightTransferError(
                f"--{QA_FILES[self.name]} {self.path}: {len(questions)} questions with an answer, fewer than "
                f"--trials {self.trials}"
            )
        documents = sorted({text for each in questions for text in (*each.documents, *each.related)})
        rng_of(self.seed, self.name).shuffle(questions)
        drawn = enumerate(questions[: self.trials])
        return [self._item(tokenizer, number, question, documents) for number, question in drawn]

    def _item(self, tokenizer: Tokenizer, number: int, question: Question, documents: list[str]) -> Item:
        rng = rng_of(self.seed, self.name, self.tokens, number)
        related = rng.sample(question.related, len(question.related))
        near = {*question.documents, *related}
        others = [document for document in documents if document not in near]
        rng.shuffle(others)
        ordered = [*question.documents, *related, *others]
        places = [rng.random() for _ in ordered]

        def write(count: int) -> str:
            shuffled = [document for _, document in sorted(zip(places[:count], ordered, strict=False))]
            listed = [f"Document {place}:\n{document}" for place, document in enumerate(shuffled, start=1)]
            return QA.format(documents="\n\n".join(listed), question=question.text)

        least = len(question.documents)
        count = fitted(tokenizer, self.tokens, write, least, len(ordered))
        if count < least:
            raise too_few(self.tokens, self.name)
        if count == len(ordered):
            raise LightTransferError(
                f"--{QA_FILES[self.name]} {self.path}: its {count} documents are fewer than {self.name} of "
                f"{self.tokens} tokens needs"
            )
        prompt = (*tokenizer.prefix, *tokenizer.encode(write(count)))
        cell = {"tokens": self.tokens}
        return Item(
            self.name, prompt, question.answers, NEW_TOKENS, "contains-any", cell, benchmark=BENCHMARK
        )
