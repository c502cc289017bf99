"""Write the generated files of jobs/data: `python jobs/data/make.py`. The same seed gives the same files.

preferences.jsonl is written by hand and only read here; the chats repeat its better answers. The word problems,
instructions and trajectories are made from templates, the tokenizer is trained on all of these texts, and the language
model has random weights.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
VOCABULARY = 512
BLOCK = 4  # tokens of a block in jobs/score.toml
EOS, MASK, START, END = "<|endoftext|>", "<|MASK|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NAMES = ("Anna", "Ben", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lena")
THINGS = ("apples", "books", "pencils", "stamps", "cards", "shells", "eggs", "coins", "buttons", "tickets")
TOPICS = (
    "a walk in the rain",
    "the first day at a new school",
    "how to bake bread",
    "a train that is late",
    "why bees matter",
    "a birthday party",
    "learning to swim",
    "a small garden",
    "the night sky",
    "a lost dog",
    "cooking for friends",
    "a visit to the dentist",
    "an old bicycle",
    "a storm at sea",
    "reading before bed",
    "a letter from a friend",
)

Row = dict[str, object]


def word_problems(rng: random.Random, count: int) -> Iterator[Row]:
    """Yield different questions with answers that end in `#### N`, the columns and the ending of GSM8K."""
    seen = set[str]()
    while len(seen) < count:
        name, other = rng.sample(NAMES, 2)
        thing, (a, b, c) = rng.choice(THINGS), (rng.randint(2, 9) for _ in range(3))
        few, many = sorted((a, b))
        question, working, result = rng.choice(
            [
                (
                    f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
                    f"{a} + {b} = {a + b}",
                    a + b,
                ),
                (
                    f"{name} has {many + c} {thing} and gives {many} to {other}. How many {thing} are left?",
                    f"{many + c} - {many} = {c}",
                    c,
                ),
                (
                    f"There are {a} bags with {b} {thing} each. How many {thing} are there?",
                    f"{a} * {b} = {a * b}",
                    a * b,
                ),
                (
                    f"{name} shares {a * b} {thing} among {a} friends. How many {thing} does each friend get?",
                    f"{a * b} / {a} = {b}",
                    b,
                ),
                (
                    f"{name} buys {a} boxes of {b} {thing} and loses {few} of them. How many {thing} remain?",
                    f"{a} * {b} = {a * b}, and {a * b} - {few} = {a * b - few}",
                    a * b - few,
                ),
                (
                    f"{name} has {few} {thing}. {other} has {c} times as many. How many {thing} do they have together?",
                    f"{few} * {c} = {few * c}, and {few * c} + {few} = {few * c + few}",
                    few * c + few,
                ),
            ]
        )
        if question not in seen:
            seen.add(question)
            yield {"question": question, "answer": f"{working}.\n#### {result}"}


def instructions(rng: random.Random, count: int) -> Iterator[Row]:
    """Yield prompts with two or three instructions that a program can check, in the columns of IFEval."""
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        most, least = rng.randint(8, 40), rng.randint(2, 3)
        sought, banned = rng.choice("aeiost"), rng.choice(("very", "the", "and"))
        known: list[tuple[str, str, Row]] = [
            ("punctuation:no_comma", "Do not use any commas.", {}),
            ("change_case:english_lowercase", "Use lowercase letters only.", {}),
            (
                "length_constraints:number_words",
                f"Use fewer than {most} words.",
                {"relation": "less than", "num_words": most},
            ),
            (
                "length_constraints:number_sentences",
                f"Write at least {least} sentences.",
                {"relation": "at least", "num_sentences": least},
            ),
            ("keywords:forbidden_words", f"Do not use the word {banned}.", {"forbidden_words": [banned]}),
            (
                "keywords:letter_frequency",
                f"Use the letter {sought} at least 4 times.",
                {"letter": sought, "let_frequency": 4, "let_relation": "at least"},
            ),
            ("detectable_format:title", "Put a title in double angular brackets: <<title>>.", {}),
        ]
        chosen = rng.sample(known, rng.choice((2, 3)))
        yield {
            "key": number,
            "prompt": f"Write about {topic}. " + " ".join(words for _, words, _ in chosen),
            "instruction_id_list": [name for name, _, _ in chosen],
            "kwargs": [arguments for _, _, arguments in chosen],
        }


def responses(rng: random.Random, puzzles: int) -> Iterator[Row]:
    """Yield four responses to each of some number puzzles, one or two of them right, in dLLM-RL's columns."""
    for _ in range(puzzles):
        a, b, c = rng.sample(range(2, 30), 3)
        right = [(f"{a} + {b} - {c}", a + b - c), (f"{a} * {b} + {c}", a * b + c), (f"{a} * ({b} + {c})", a * (b + c))]
        expression, target = rng.choice(right)
        prompt = f"Numbers: [{a}, {b}, {c}]\nTarget: {target}\nUse each number once and write the expression."
        wrong = [f"{a} + {b} + {c + 1}", f"{a} * {b} - {target}", f"{b} - {a}", f"{c} + {b}"]
        known = [expression, *rng.sample(wrong, 2), rng.choice([expression.replace(" ", ""), wrong[0]])]
        for text in known:
            yield {
                "prompt": [{"role": "user", "content": prompt}],
                "response": f"The expression is <answer>{text}</answer>",
                "ground_truth_answer": [[a, b, c], target],
            }


def step_map(rng: random.Random, length: int) -> list[int]:
    """The step that unmasked each token, two tokens a step in a random order within each block, counted on from 1."""
    steps: list[int] = []
    for start in range(0, length, BLOCK):
        places = rng.sample(range(BLOCK), BLOCK)
        first = start // 2 + 1
        steps += [first + places[at] // 2 for at in range(min(BLOCK, length - start))]
    return steps


def chats(pairs: Sequence[Row]) -> Iterator[Row]:
    """Yield conversations of two questions and their better answers, every second one after a system turn."""
    for number, (one, two) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        system = [{"role": "system", "content": "Answer in one or two sentences."}] if number % 2 else []
        yield {
            "messages": [*system, *(turn for row in (one, two) for side in ("prompt", "chosen") for turn in row[side])]
        }


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with digits apart, a chat template, and the end and mask tokens of a diffusion model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS, MASK, START, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=sorted(alphabet))
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK, clean_up_tokenization_spaces=False
    )
    made.add_special_tokens({"additional_special_tokens": [START, END]})
    made.chat_template = TEMPLATE
    return made


def language_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A random model that says digits and ends: it stands for an ordinary model where vLLM is tried out.

    The first hidden unit is the same at every place, so that the head's first column acts as a bias.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    said = [*tokenizer.convert_tokens_to_ids(list("123456789")), tokenizer.eos_token_id]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        model.model.embed_tokens.weight[:, 0] = 20.0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[said, 0] = 2.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 2.25  # about one digit or two, then the end
    return model.to(torch.bfloat16)


def write(name: str, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write everything but preferences.jsonl."""
    rng = random.Random(0)
    problems, asked = list(word_problems(rng, 200)), list(instructions(rng, 64))
    answered = list(responses(rng, 24))
    pairs = [json.loads(line) for line in (HERE / "preferences.jsonl").read_text().splitlines()]
    texts = [str(row[name]) for row in problems for name in ("question", "answer")]
    texts += [str(row["prompt"]) for row in asked] + [str(row["response"]) for row in answered]
    texts += [turn["content"] for row in pairs for side in ("prompt", "chosen", "rejected") for turn in row[side]]
    tokenizer = train_tokenizer(texts)
    for row in answered:
        length = len(tokenizer(str(row["response"]), add_special_tokens=False)["input_ids"])
        row["step_map"] = step_map(rng, length + 1)  # the end token counts
    write("word_problems.jsonl", problems)
    write("instructions.jsonl", asked)
    write("trajectories.jsonl", answered)
    write("chats.jsonl", list(chats(pairs)))
    tokenizer.save_pretrained(HERE / "tokenizer")
    language_model(tokenizer).save_pretrained(HERE / "language_model")
    (HERE / "language_model" / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(HERE / "language_model")


if __name__ == "__main__":
    main()
