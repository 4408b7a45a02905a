"""Verbs that bring several rooms together: a model or a run, data, and a system that acts on them.

A verb that needs its own room alone lives there (`opsin.restore.verb`).
"""
