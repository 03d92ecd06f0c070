"""The recipe of the embedded demo model: `corpus` (text), `pretraining` (model), `evaluation` (scores)."""
