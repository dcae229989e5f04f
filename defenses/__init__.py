"""One file per defense or baseline.

A defense module defines

    Config             frozen dataclass of hyper-parameters in the paper's symbols, a source beside each constant
    SETTINGS           {(paper, variant): Config}, e.g. ("nad", "released")
    requires(config)   what it needs beyond the clean images, out of {"clean-model", "test-images", "test-asr"}; usually
                       empty. The last two are for settings that reproduce how published scripts use test data: FMP's
                       leak, and ANP's threshold chosen by test ASR, a row called oracle. They are for nothing else
    builds_on(config)  optional: (defense, settings) whose run, on the same victim and clean data, these start from, so
                       that one search serves all that use it; or None
    trained(config, images)
                       optional: how many images go through the epochs of its recipes, given how many clean ones there
                       are, where these do not see each of them once an epoch; for estimates of time only
    work(config, images, classes)
                       optional: how many images go forwards and backwards beside the epochs of its recipes, given how
                       many clean images and classes there are; for estimates of time only
    defend(model, clean, config, seed, observe=silent, clean_model=None) -> Defended
                       with builds_on also base=None: the tensors of the run that it names

`model` is left untouched. A defense sees the clean subset only: never the trigger, the target label or test data.
(A setting whose official code is told the target label has it as a constant.)
It reports each epoch to `observe` and hears nothing back. Adding a defense is adding such a file and naming it in
a protocol: modules are found by their name.

A defense of text classifiers says MODALITY = "text" and defines the same, but for

    requires(config)   out of {"training-data"}: a defense that cleans the poisoned training set
    defend(model, clean, config, seed, observe=silent, base=None, training=None) -> Guard
                       model: `reproduce.models.encoder.TextClassifier` in eval mode; clean: `Texts`; base: as above;
                       training: `TrainingData`, where it is required
"""
