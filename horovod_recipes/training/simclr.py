"""SimCLR's training step, with gradient caching over micro-batches."""

import keras
import tensorflow as tf

from horovod_recipes.models.losses import contrast

# The metrics of the probe, which evaluation reports too.
PROBE_METRICS = ("probe_loss", "top1")


@keras.saving.register_keras_serializable("horovod_recipes")
class NTXent(keras.losses.Loss):
    """Holds the temperature of NT-Xent in the settings of a compiled model.

    Args:
        temperature: Float > 0.
    """

    def __init__(self, temperature, name="nt_xent"):
        super().__init__(name=name)
        self.temperature = temperature

    def call(self, y_true, y_pred):
        """Returns the loss of the embeddings of first and second views."""
        return contrast(y_true, y_pred, self.temperature).loss

    def get_config(self):
        return {"temperature": self.temperature, "name": self.name}


@keras.saving.register_keras_serializable("horovod_recipes")
class Uniformity(keras.metrics.Mean):
    """The logarithm of a mean; 0 without values."""

    def result(self):
        is_empty = self.count == 0
        mean = keras.ops.where(is_empty, 1.0, super().result())
        return keras.ops.log(mean)


@keras.saving.register_keras_serializable("horovod_recipes")
class SimCLRModel(keras.Model):
    """Trains a `models.heads.simclr_network` on views of all ranks' images.

    A batch of `fit` is one update: `(views, labels)`, with uint8 views
    `[micro-batches, images, 2, height, width, channels]` and integer labels
    `[micro-batches, images]`. The contrastive loss is that of the global batch.

    With several micro-batches, the gradient is computed in two passes (gradient
    caching, Gao et al., https://arxiv.org/abs/2101.06983). The first pass
    computes all embeddings, without keeping activations. Then come the loss and
    its gradient with respect to the embeddings. The second pass computes each
    micro-batch again, and its part of the gradient. The result equals one pass
    over the global batch, except that batch norm computes its statistics over a
    micro-batch. Random operations draw the same numbers in both passes.

    The probe learns from the features of both views. Its loss is added to the
    contrastive loss, but does not change the encoder.

    Compile it with the loss `NTXent`. Evaluation takes batches of images
    `[images, height, width, channels]` and labels, and reports the probe.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        super().__init__(inputs, outputs, name=name, **kwargs)
        self._mean_contrastive_loss = keras.metrics.Mean("contrastive_loss")
        self._contrastive_top1 = keras.metrics.Mean(name="contrastive_top1")
        self._alignment = keras.metrics.Mean(name="alignment")
        self._uniformity = Uniformity(name="uniformity")
        self._probe_loss = keras.metrics.Mean(name="probe_loss")
        self._top1 = keras.metrics.SparseCategoricalAccuracy(name="top1")
        self._is_evaluated = False

    def train_step(self, data):
        views, labels = data
        if views.shape[0] == 1:
            gradients = self._gradients_in_one_pass(views[0], labels[0])
        else:
            gradients = self._gradients_in_two_passes(views, labels)
        self.optimizer.apply(gradients, self.trainable_variables)
        return self.get_metrics_result()

    def _gradients_in_one_pass(self, views, labels):
        with tf.GradientTape() as tape:
            first, second, logits = self._forward(views)
            loss = self._contrastive_loss(first, second)
            loss += self._loss_of_probe(logits, labels)
            loss = self.optimizer.scale_loss(loss)
        return tape.gradient(loss, self._values())

    def _gradients_in_two_passes(self, views, labels):
        count = views.shape[0]
        first, second = self._embeddings(views)
        with tf.GradientTape() as tape:
            tape.watch((first, second))
            loss = self.optimizer.scale_loss(
                self._contrastive_loss(
                    *(tf.concat(tf.unstack(e), 0) for e in (first, second))
                )
            )
        of_first, of_second = tape.gradient(loss, (first, second))

        def add_micro_batch(index, sums):
            with tf.GradientTape() as tape:
                first, second, logits = self._forward(views[index])
                probe_loss = self._loss_of_probe(logits, labels[index]) / count
                # Its gradient is that of the contrastive loss, by chain rule.
                loss = (
                    tf.reduce_sum(first * of_first[index])
                    + tf.reduce_sum(second * of_second[index])
                    + self.optimizer.scale_loss(probe_loss)
                )
            gradients = tape.gradient(loss, self._values())
            return index + 1, [
                a + tf.cast(b, a.dtype)
                for a, b in zip(sums, gradients, strict=True)
            ]

        _, sums = tf.while_loop(
            lambda index, sums: index < count,
            add_micro_batch,
            (0, [tf.zeros_like(value) for value in self._values()]),
            parallel_iterations=1,
        )
        return sums

    def _embeddings(self, views):
        """Returns the embeddings `[micro-batches, images, size]` of both views.

        Leaves the model as it was: its moving statistics, and the state of its
        random generators.
        """
        state = [tf.identity(v.value) for v in self.non_trainable_variables]
        embeddings = tf.map_fn(
            lambda views: self._forward(views)[:2],
            views,
            fn_output_signature=(tf.float32, tf.float32),
            parallel_iterations=1,
        )
        with tf.control_dependencies(embeddings):
            for variable, value in zip(
                self.non_trainable_variables, state, strict=True
            ):
                variable.assign(value)
        return embeddings

    def _forward(self, views):
        """Returns the embeddings of both views, and the probe's logits."""
        images = tf.concat([views[:, 0], views[:, 1]], axis=0)
        outputs = self(images, training=True)
        embeddings = tf.cast(outputs["embedding"], tf.float32)
        return *tf.split(embeddings, 2), outputs["logits"]

    def _contrastive_loss(self, first, second):
        result = contrast(first, second, self.loss.temperature)
        self._mean_contrastive_loss.update_state(result.loss)
        self._contrastive_top1.update_state(result.hits)
        self._alignment.update_state(result.alignment)
        self._uniformity.update_state(result.uniformity)
        return result.loss

    def _loss_of_probe(self, logits, labels):
        labels = tf.tile(labels, [tf.shape(logits)[0] // tf.shape(labels)[0]])
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        self._probe_loss.update_state(losses)
        self._top1.update_state(labels, logits)
        return tf.reduce_mean(losses)

    def _values(self):
        return [variable.value for variable in self.trainable_variables]

    def test_step(self, data):
        images, labels = data
        logits = self(images, training=False)["logits"]
        self._loss_of_probe(logits, labels)
        return self.get_metrics_result()

    def evaluate(self, *args, **kwargs):
        self._is_evaluated = True
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._is_evaluated = False

    def get_metrics_result(self):
        results = super().get_metrics_result()
        if self._is_evaluated:
            return {name: results[name] for name in PROBE_METRICS}
        # Keras's own mean sees no loss, because `train_step` is replaced.
        results["loss"] = results.pop("contrastive_loss")
        return results
