"""Corpora by the name of their task."""

from powernap.train.data.corpus import Corpus
from powernap.train.data.gsm_infinite import GsmInfinite
from powernap.train.data.text import Text

CORPORA: dict[str, type[Corpus]] = {kind.name: kind for kind in (Text, GsmInfinite)}
