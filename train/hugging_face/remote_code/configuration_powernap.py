"""Configuration of a model that sleeps."""

from transformers import PretrainedConfig


class PowernapConfig(PretrainedConfig):
    """The `model` and `sleep` sections of the recipe that the model was trained with.

    Args:
        model: pattern, window, sizes: docs of Powernap's recipes say what each field means.
        sleep: what happens to a full window; `passes` is N.
    """

    model_type = "powernap"

    def __init__(self, model: dict | None = None, sleep: dict | None = None, **others):
        self.model = model or {}
        self.sleep = sleep or {}
        self.vocab_size = self.model.get("vocab_size", 2)
        self.hidden_size = self.model.get("hidden_size", 1)
        self.num_hidden_layers = len(self.model.get("pattern", ""))
        others.setdefault("tie_word_embeddings", self.model.get("tie_embeddings", False))
        super().__init__(**others)

    @property
    def passes(self) -> int:
        """N of every sleep; the largest that was trained, unless `sleep["passes"]` is set to another number."""
        passes = self.sleep.get("passes", 1)
        return max(passes) if isinstance(passes, list) else passes
