"""The demo: a small language model trained with the ordinary cross-entropy and with ``cce``.

``text`` reads a corpus, ``tokens`` turns it into token ids, ``model`` and ``train`` train, ``measure`` and ``evaluate``
examine the loss on the trained model, ``report`` and ``plot`` show the results, ``run`` calls all of them in this
order. The required packages are those of the extra ``demo``.
"""
