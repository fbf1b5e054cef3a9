"""The refit without data: what a linear layer's inputs were is taken from the task vectors themselves.

A finetune's update of a linear layer is a sum of products (gradient ⊗ input), so its rows lie in the span of the inputs
that it was trained on. Its Gram matrix therefore stands for that of the inputs (WUDI-Merging, arXiv 2503.08099), and
the merged layer that disturbs no task on its own inputs is a least-squares problem (RegMean, arXiv 2212.09849). What is
ours: one support for all tasks, and the values solved again inside it.
"""
