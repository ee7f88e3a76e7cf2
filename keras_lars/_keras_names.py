"""The private names of Keras's optimizers that keras_lars uses, and why.

A new version of Keras may lack one. A test then fails and names it.
"""

WHY = {
    "_apply_weight_decay": (
        "Overridden to do nothing: Keras's decay is decoupled from the "
        "gradient, and LARS adds its own to the gradient."
    ),
    "_backend_update_step": (
        "Overridden to compile the update of all variables as one program: "
        "`update_step` sees one variable at a time. TrustRatio also replaces "
        "and calls it on the optimizer inside: some do work there once a step."
    ),
    "_get_current_learning_rate": (
        "Overridden to call a schedule with `iterations`, which counts "
        "updates: Keras passes the number of micro-batches."
    ),
    "_get_variable_index": (
        "Finds the velocity and the ratio of the variable that "
        "`update_step` gets: TensorFlow's variables have no path."
    ),
    "_learning_rate": (
        "The schedule itself: `learning_rate` returns its current value."
    ),
    "_trainable_variables": (
        "The variables to compile the update of: Keras would track a list "
        "in another attribute as state of the optimizer, and save it."
    ),
    "_use_weight_decay": (
        "Tells what the method `exclude_from_weight_decay` has excluded."
    ),
}

# `ConvMuon` overrides these of `keras.optimizers.Muon`.
WHY_OF_MUON = {
    "lr_adjust": "Scales by the sides of the matrix, not of the kernel.",
    "_should_use_adamw": "Lets kernels of convolutions through.",
    "zeropower_via_newtonschulz5": (
        "Reshapes a kernel to a matrix before, and back after."
    ),
}
