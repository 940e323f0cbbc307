"""The demo: a small language model trained with the ordinary cross-entropy and with ``cce``.

``text`` reads a corpus, ``tokens`` makes token ids of it, ``model`` and ``train`` train, ``measure`` and
``evaluate`` look at the loss on the trained model, ``report`` and ``plot`` show the results, ``run`` calls all
of them in this order. Its packages are those of the extra ``demo``.
"""
