"""hvd.elastic on two ranks: commits, restores, callbacks, the sampler.

Jobs whose ranks come and go are in tests/jobs/elastic_test.py.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from keras_lars import LARS
from tests.parallel.common import arrays_of_ranks

EXAMPLES = 20


def create_state(**values):
    """Returns the state of a small model, with these values."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    compile_model(model, keras.optimizers.SGD(0.1))
    return hvd.elastic.KerasState(model, **values)


def create_full_state(seed=0, **values):
    """Returns a state with batch norm, dropout and LARS."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3),
        ]
    )
    compile_model(model, LARS(2.0))
    return hvd.elastic.KerasState(model, **values)


def compile_model(model, optimizer):
    model.compile(
        hvd.DistributedOptimizer(optimizer),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )


def batches(number):
    """Returns a dataset of batches of 2, different on each rank."""
    rng = np.random.default_rng(hvd.rank())
    x = rng.normal(size=(2 * number, 4)).astype("float32")
    y = np.arange(2 * number) % 3
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(2).repeat()


def fit(state, steps, callbacks=(), epochs=1):
    state.model.fit(
        batches(steps),
        steps_per_epoch=steps,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks],
    )


def values(state):
    """Returns weights, states of generators, and the optimizer's state."""
    variables = state.model.variables + state.optimizer.variables
    return [np.array(v) for v in variables]


def are_equal(first, second):
    return [np.array_equal(a, b) for a, b in zip(first, second, strict=True)]


def test_restore_is_bit_equal_to_the_last_commit():
    state = create_full_state(batch=0, notes=[])
    state.sync()
    fit(state, 2)
    state.batch = 2
    state.notes.append("committed")
    state.commit()
    committed = values(state)

    fit(state, 3)
    state.batch = 5
    state.notes.append("lost")
    # Weights, statistics, masks, momentum and iterations have changed.
    changed = are_equal(values(state), committed)
    assert changed.count(False) >= 10
    state.restore()
    assert all(are_equal(values(state), committed))
    assert (state.batch, state.notes) == (2, ["committed"])

    # The same steps from there give the same weights and masks.
    fit(state, 3)
    first = values(state)
    state.restore()
    fit(state, 3)
    assert all(are_equal(values(state), first))


def test_sync_gives_all_ranks_the_state_of_the_first():
    state = create_full_state(
        seed=hvd.rank(), batch=20 + hvd.rank(), epoch=10 + hvd.rank()
    )
    weights = arrays_of_ranks(state.model.weights)
    assert not all(are_equal(*weights))
    state.sync()
    synced = arrays_of_ranks(state.model.weights)
    assert all(are_equal(synced[0], synced[1]))
    assert all(are_equal(synced[0], weights[0]))
    assert (state.batch, state.epoch) == (20, 10)
    # A restore gives this state.
    state.batch = 25
    state.model.set_weights([w + 1 for w in state.model.get_weights()])
    state.restore()
    assert all(are_equal(state.model.get_weights(), weights[0]))
    assert state.batch == 20


def test_sync_does_not_take_the_state_of_a_new_rank_0():
    """Rank 0 has just joined; the weights of rank 1 are trained."""
    state = create_full_state(seed=hvd.rank(), batch=0)
    if hvd.rank() == 1:
        state.batch = 7
        state.save()
    weights = arrays_of_ranks(state.model.weights)
    state.sync()
    assert all(are_equal(state.model.get_weights(), weights[1]))
    assert state.batch == 7


def test_seeds_stay_each_ranks_own():
    state = create_full_state(seed=hvd.rank())
    state.sync()
    (seed,) = [
        np.array(v)
        for v in state.model.variables
        if v.name == "seed_generator_state"
    ]
    first, second = hvd.allgather_object(seed)
    assert first[0] != second[0]


def test_no_commit_within_an_update():
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False)]
    )
    model.set_weights([np.zeros((1, 1))])
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), backward_passes_per_step=2
    )
    state = hvd.elastic.KerasState(model, optimizer, batch=0)

    def apply(gradient):
        optimizer.apply([tf.constant([[gradient]])], model.trainable_variables)
        return model.get_weights()[0].item()

    assert [apply(1.0), apply(2.0), apply(10.0)] == [0.0, -3.0, -3.0]
    state.batch = 3
    state.commit()
    # The commit did nothing: the third gradient waits for a fourth.
    state.restore()
    assert state.batch == 0
    assert model.get_weights()[0].item() == 0.0
    # The restore has discarded that gradient.
    assert [apply(1.0), apply(2.0)] == [0.0, -3.0]
    state.batch = 2
    state.commit()
    assert apply(10.0) == -3.0
    state.restore()
    assert (state.batch, apply(1.0)) == (2, -3.0)


class Commits(keras.callbacks.Callback):
    """Records the commits of a state, each with the number of updates."""

    def __init__(self, state):
        super().__init__()
        self.found = []
        commit = state.commit

        def recorded_commit():
            updates = int(state.optimizer.iterations)
            self.found.append((state.epoch, state.batch, updates))
            commit()

        state.commit = recorded_commit


def elastic_callbacks(state, batches_per_commit):
    return [
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.UpdateEpochStateCallback(state),
        hvd.elastic.CommitStateCallback(state, batches_per_commit),
    ]


def test_fit_commits_every_few_batches_and_at_the_end_of_an_epoch():
    state = create_state(batch=0, epoch=0)
    commits = Commits(state)
    fit(state, 5, elastic_callbacks(state, 2), epochs=2)
    assert commits.found == [
        *[(0, 2, 2), (0, 4, 4), (1, 0, 5)],
        *[(1, 2, 7), (1, 4, 9), (2, 0, 10)],
    ]


def test_default_is_a_commit_after_each_batch():
    state = create_state(batch=0, epoch=0)
    commits = Commits(state)
    callbacks = elastic_callbacks(state, 1)
    callbacks[2] = hvd.elastic.CommitStateCallback(state)
    fit(state, 3, callbacks)
    # The last commit is the epoch's.
    assert commits.found == [(0, 1, 1), (0, 2, 2), (1, 0, 3)]


def test_first_epoch_leaves_out_finished_batches():
    state = create_state(batch=3, epoch=4)
    commits = Commits(state)
    fit(state, 5, elastic_callbacks(state, 1), epochs=2)
    assert commits.found == [
        *[(4, 4, 1), (5, 0, 2)],
        *[(5, 1, 3), (5, 2, 4), (5, 3, 5), (5, 4, 6), (6, 0, 7)],
    ]


def test_an_early_stop_in_the_shorter_epoch_counts():
    state = create_state(batch=3, epoch=0)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    fit(state, 5, [*elastic_callbacks(state, 1), Stop()], epochs=3)
    assert (state.epoch, int(state.optimizer.iterations)) == (1, 2)


def test_commits_with_steps_per_execution():
    state = create_state(batch=0, epoch=0)
    state.model.steps_per_execution = 2
    commits = Commits(state)
    fit(state, 6, elastic_callbacks(state, 2))
    assert commits.found == [(0, 2, 2), (0, 4, 4), (1, 0, 6)]


@pytest.mark.slow
def test_more_batches_than_the_sampler_has_are_an_error():
    """Keras makes 6 steps instead of 5. fit would end at the sixth."""
    sampler = hvd.elastic.ElasticSampler(10, 2)
    state = create_state(batch=0, epoch=0, sampler=sampler)
    state.model.steps_per_execution = 2
    message = "steps_per_epoch` of fit must be the sampler's, 5, and `steps_per"
    with pytest.raises(ValueError, match=message):
        fit(state, 5, elastic_callbacks(state, 1), epochs=2)
    assert sampler.reports == []


@pytest.mark.parametrize("shuffle", [False, True])
def test_sampler_distributes_every_example_once(shuffle):
    sampler = hvd.elastic.ElasticSampler(11, 4, shuffle=shuffle, seed=3)
    assert sampler.steps_per_epoch == 3
    batches = sampler.batches()
    shares = [next(batches) for _ in range(6)]
    all_shares = hvd.allgather_object(shares)
    # Batches of 4, 4 and 3, split among the ranks.
    assert [len(s) for s in all_shares[0]] == [2, 2, 2] * 2
    assert [len(s) for s in all_shares[1]] == [2, 2, 1] * 2
    epochs = [
        np.concatenate([s for ranks in all_shares for s in ranks[i : i + 3]])
        for i in (0, 3)
    ]
    for indices in epochs:
        assert sorted(indices) == list(range(11))
    assert np.array_equal(*epochs) != shuffle


def test_sampler_continues_with_what_is_left_after_a_commit():
    sampler = hvd.elastic.ElasticSampler(EXAMPLES, 6)
    state = create_state(sampler=sampler)
    state.sync()
    batches = sampler.batches()
    whole = [next(batches) for _ in range(4)]
    for _ in range(2):
        sampler.record_batch()
    state.commit()
    sampler.record_batch()
    state.restore()
    assert sampler.report() == {
        "epoch": 0,
        "used_once": 10,
        "never_used": 10,
        "used_again": 0,
    }
    # The third batch was lost, so the sampler distributes it again.
    rest = sampler.batches()
    for expected in whole[2:]:
        np.testing.assert_array_equal(next(rest), expected)
        sampler.record_batch()
    sampler.end_epoch()
    assert (sampler.epoch, sampler.reports) == (
        1,
        [{"epoch": 0, "used_once": 20, "never_used": 0, "used_again": 0}],
    )


def test_sampler_finds_an_example_that_two_ranks_have_used():
    """It counts the records of each rank, not its own plan."""
    sampler = hvd.elastic.ElasticSampler(4, 4, shuffle=False, seed=0)
    other = hvd.elastic.ElasticSampler(4, 4, shuffle=True, seed=5)
    mine = other if hvd.rank() == 1 else sampler
    # Rank 0 has used 0 and 1; rank 1 has another order.
    mine.record_batch()
    used = hvd.allgather_object(next(mine.batches()))
    assert list(used[0]) == [0, 1]
    twice = len(set(used[0]) & set(used[1]))
    assert twice > 0
    mine.end_epoch()
    assert mine.reports[0]["used_again"] == twice
    assert mine.reports[0]["never_used"] == twice


def test_fit_accounts_for_every_example():
    sampler = hvd.elastic.ElasticSampler(EXAMPLES, 6)
    state = create_state(batch=0, epoch=0, sampler=sampler)
    state.sync()
    features = tf.random.stateless_normal((EXAMPLES, 4), [0, 0])
    batches, taken = sampler.batches, []

    def recorded_batches():
        taken.append([])
        for indices in batches():
            taken[-1].append(indices)
            yield indices

    sampler.batches = recorded_batches
    dataset = sampler.dataset().map(lambda i: (tf.gather(features, i), i % 3))
    # Its thread would make the end of `fit` wait.
    assert not dataset.options().autotune.enabled
    state.model.fit(
        dataset,
        steps_per_epoch=sampler.steps_per_epoch,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=elastic_callbacks(state, 3),
    )
    assert sampler.reports == [
        {"epoch": e, "used_once": 20, "never_used": 0, "used_again": 0}
        for e in (0, 1)
    ]
    # Keras has looked at the first batch alone before.
    batches_of_fit = taken[-1][: 2 * sampler.steps_per_epoch]
    batches_of_ranks = hvd.allgather_object(batches_of_fit)
    used = np.concatenate([b for batches in batches_of_ranks for b in batches])
    assert sorted(used) == sorted(2 * list(range(EXAMPLES)))


def test_sampler_refuses_a_batch_above_the_epoch():
    with pytest.raises(ValueError, match=r"from 1 to the 4 .*: .*=5"):
        hvd.elastic.ElasticSampler(4, 5)


def test_state_refuses_what_it_cannot_hold():
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="must be built first"):
        hvd.elastic.KerasState(model)
    model.build((None, 1))
    with pytest.raises(ValueError, match="`optimizer` is missing"):
        hvd.elastic.KerasState(model)


def test_other_errors_are_not_swallowed():
    """Horovod's own `run` returns None after any UnknownError."""
    state = create_state()
    starts = []

    def fail(step):
        raise OSError("the disk is on fire")

    @hvd.elastic.run
    def train(state):
        starts.append(hvd.rank())
        dataset = tf.data.Dataset.range(4).map(
            lambda i: tf.ensure_shape(tf.py_function(fail, [i], tf.float32), [])
        )
        return list(dataset)

    with pytest.raises(tf.errors.UnknownError, match="disk is on fire"):
        train(state)
    assert len(starts) == 1


def test_errors_of_horovods_operations_are_recognised():
    message = "[gloo/transport/tcp/pair.cc:589] Read error"
    stack = '  File "/site-packages/horovod_recipes/train.py", in horovod_main'
    for text, expected in [
        ("Horovod has been shut down. This was caused by", True),
        (f"{message} [Op:HorovodGroupedAllreduce]", True),
        (f"in horovod_grouped_allgather\n{message}", True),
        (f"{stack}\n{message}", False),
    ]:
        error = tf.errors.UnknownError(None, None, text)
        assert hvd.callbacks.is_lost_rank(error) is expected, text
    # Ranks with different shapes would fail again.
    assert not hvd.callbacks.is_lost_rank(
        tf.errors.FailedPreconditionError(None, None, "HorovodAllreduce")
    )


def test_run_returns_what_the_function_returns():
    @hvd.elastic.run
    def train(state, added, *, twice):
        return (state.batch + added) * (2 if twice else 1)

    assert train(create_state(batch=4), 3, twice=True) == 14
