"""Rows in the columns of public preference sets; the texts are ours."""

from typing import Any

Value = dict[str, Any]
ASK = {"role": "user", "content": "Why?"}
RATED = {"annotations": {"helpfulness": {"Rating": "4"}}, "critique": "Fine.", "custom_system_prompt": "Be good."}
RATED |= {"principle": "helpfulness", "model": "m", "fine-grained_score": 4.0}
VOTED = {"answer_id": 1, "author": "a", "author_id": 2, "author_profile": "url", "selected": False}
SAFE = {
    f"response_{n}_{what}": value
    for what, value in (("source", "m"), ("harm_category", {"x": False}), ("severity_level", 0), ("sha256", "f"))
    for n in (0, 1)
}
STATED = {"preference_statement": "@", "preference_elaboration": "x", "three_most_similar_preferences": [{"a": 1}]}
SHP = {
    "post_id": "p",
    "domain": "d",
    "upvote_ratio": 0.9,
    "history": "Why?",
    "seconds_difference": 5.0,
    "score_ratio": 2.0,
}
SHP |= {f"{n}_{s}": 1 for n in ("score", "c_root_id", "created_at_utc") for s in "AB"}
HELP = {"prompt": "Why?", "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}

# the columns of public sets; SO, NO and MID are its best, worst and another answer
GRADED: dict[str, Value] = {
    "Nectar": {
        "prompt": "\n\nHuman: Why?\n\nAssistant: ",
        "answers": [{"answer": text, "model": "m", "rank": n} for text, n in (("Mid.", 2), ("So.", 1), ("No.", 7))],
        "turns": 1, "num_responses": 3, "source": ["a"], "good_natured": True,
    },
    "UltraFeedback": {
        "source": "evol", "instruction": "Why?", "models": ["m"],
        "completions": [
            RATED | {"response": text, "overall_score": n} for text, n in (("No.", 2.5), ("So.", 9.0), ("Mid.", 5.0))
        ],
        "correct_answers": ["None"], "incorrect_answers": ["None"],
    },
    "Stack Exchange": {
        "qid": 5, "question": "Why?", "date": "2016", "metadata": ["url"],
        "answers": [VOTED | {"text": text, "pm_score": n} for text, n in (("So.", 4), ("No.", -1), ("Mid.", 0))],
    },
    "Stack Exchange, paired": {
        "qid": 5, "question": "Why?", "date": "2016", "metadata": ["url"], "response_j": "So.", "response_k": "No."
    },
    "HelpSteer3": {
        "domain": "general", "language": "english", "context": [ASK], "response1": "So.", "response2": "No.",
        "overall_preference": -2, "individual_preference": [{"score": -2, "reasoning": "x", "feedback1": "y"}],
    },
    "HelpSteer2, preferences": STATED | {
        "split": "train", "prompt": "Why?", "response_1": "No.", "response_2": "So.", "preference_strength": 1,
        "all_preferences_unprocessed": [{"a": 1}],
    },
    "PKU-SafeRLHF": SAFE | {
        "prompt": "Why?", "response_0": "No.", "response_1": "So.", "prompt_source": "p", "is_response_0_safe": False,
        "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 1,
    },
    "SHP": SHP | {"human_ref_A": "So.", "human_ref_B": "No.", "labels": 1},
}  # fmt: skip


def turns(*texts: str) -> list[Value]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


SIDES = {"chosen": turns("Why?", "So."), "rejected": turns("Why?", "No.")}
MODELS = {"chosen_model": "m", "rejected_model": "n"}
PAIRED: dict[str, Value] = {
    "UltraFeedback, binarized": {
        "prompt": "Why?", "prompt_id": "7", **SIDES, "messages": SIDES["chosen"], "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
    "HH-RLHF": {f: f"\n\nHuman: Why?\n\nAssistant: {t}" for f, t in (("chosen", "So."), ("rejected", "No."))},
    "orca_dpo_pairs": {"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "No."},
    "UltraFeedback, cleaned": {
        "source": "evol", "prompt": "Why?", **SIDES, "chosen-rating": 5.0, "chosen-model": "m", "rejected-rating": 2.0,
        "rejected-model": "n",
    },
    "orpo-dpo-mix": {"source": "mix", **SIDES, "prompt": None, "question": "Why?"},
    "Tulu 3": {"id": "1", "source": "mix", "prompt": "Why?", **SIDES, **MODELS},
    "Skywork": {**SIDES, "source": "mix"},
    "capybara": {
        "source": "a", "conversation": [{"input": "Why?", "output": "Tell me."}, {"input": "And?", "output": "So."}],
        "original_response": "So.", "generation_prompt": ["x"], "raw_generation_responses": ["y"],
        "new_generations": ["No."],
        "prompt": "And?", "chosen": turns("Why?", "Tell me.", "And?", "So."), **MODELS, "rating_chosen": 5,
        "rejected": turns("Why?", "Tell me.", "And?", "No."), "rating_rejected": 2,
    },
}  # fmt: skip
