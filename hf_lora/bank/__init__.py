"""Many classifiers on one encoder: adapters are added and removed while texts are answered."""
