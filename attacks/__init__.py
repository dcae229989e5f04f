"""One file per attack: the trigger, the poisoning rule, and every paper's settings for it.

An attack module defines

    Config                   frozen dataclass of hyper-parameters in the paper's symbols, a source beside each
                             constant; always has `target`, `rate` and `labels` (see `reproduce.poisoning`)
    SETTINGS                 {(paper, variant): Config}, e.g. ("nad", "released")
    requires(config)         what it needs beyond the training images, out of
                             {"clean-model", "pictures", "own-images", "arrays"} (see `reproduce.poisoning.Context`)
    prepare(config, context) the trigger's state, a dict of tensors (saved with the victim); {} if it has none
    apply(images, config, state, seed, split)
                             the trigger: uint8 (N, 3, H, W) -> uint8 (N, 3, H, W); pure and batched;
                             split is "train" or "test" and matters only where the two differ (Refool)
    TRAINING_ONLY            optional, True where `apply` does not read the state: it is then not published
    poison(images, labels, config, state, seed, num_classes)
                             the training set it leaves behind: `reproduce.poisoning.Poisoned`

An attacker who controls the training itself defines, instead of `poison`,

    implant(model, images, labels, config, state, recipe, seed, num_classes, observe=silent, checkpoint=None)
                             train `model` in place on the clean set by the victim's recipe; returns (history, state):
                             rows as `reproduce.training.train` returns them (one may name another "phase" than
                             "victim"), and the trigger's final state, which is saved and handed to `apply`. An
                             interrupted training goes on from `checkpoint` and ends bit for bit the same
    work(config, images)     optional: what it trains beside the classifier on so many training images, in training
                             passes of one image through WRN-16-1; for time estimates only

An attack on texts says MODALITY = "text" and defines Config, SETTINGS, requires (out of {"paraphrases"}) and

    apply(texts, rows, config, seed, split, paraphrases)
                             the trigger: N sentences, which are rows `rows` of the split ("train", "validation",
                             "test"), with the trigger; pure, and what is drawn for a row depends on (seed, split, row)
                             alone. paraphrases: `reproduce.data.texts.Paraphrases` of the data set

Adding an attack is adding such a file and naming it in a protocol: modules are found by their name.
"""
