"""The columns of Neuronpedia's tables, by the file that has their rows."""

# The columns of Neuronpedia's tables: apps/webapp/prisma/schema.prisma, as of 2026-11. "?": may be
# null; a column that is not named here is none. What has no default there is in REQUIRED.
TEXT, NUMBER, WHOLE, TRUTH, TEXTS, NUMBERS = str, float, int, bool, [str], [float]
COLUMNS = {
    "release": {
        "name": TEXT, "visibility": TEXT, "isNewUi": TRUTH, "featured": TRUTH, "description": TEXT,
        "descriptionShort?": TEXT, "urls": TEXTS, "creatorEmail?": TEXT, "creatorName": TEXT,
        "creatorNameShort?": TEXT, "creatorId": TEXT, "defaultSourceSetName?": TEXT,
        "defaultSourceId?": TEXT, "defaultUmapSourceIds": TEXTS, "createdAt": TEXT,
    },
    "model": {
        "id": TEXT, "displayNameShort": TEXT, "displayName": TEXT, "creatorId": TEXT,
        "tlensId?": TEXT, "dimension?": WHOLE, "thinking": TRUTH, "visibility": TEXT,
        "defaultSourceSetName?": TEXT, "defaultSourceId?": TEXT, "inferenceEnabled": TRUTH,
        "instruct": TRUTH, "layers": WHOLE, "neuronsPerLayer": WHOLE, "createdAt": TEXT,
        "owner": TEXT, "updatedAt": TEXT, "website?": TEXT,
    },
    "sourceset": {
        "modelId": TEXT, "name": TEXT, "hasDashboards": TRUTH, "allowInferenceSearch": TRUTH,
        "visibility": TEXT, "description": TEXT, "type": TEXT, "creatorName": TEXT, "urls": TEXTS,
        "creatorEmail?": TEXT, "creatorId": TEXT, "releaseName?": TEXT, "createdAt": TEXT,
    },
    "source": {
        "id": TEXT, "modelId": TEXT, "hasDashboards": TRUTH, "inferenceEnabled": TRUTH,
        "saelensRelease?": TEXT, "saelensSaeId?": TEXT, "hfRepoId?": TEXT, "hfFolderId?": TEXT,
        "visibility": TEXT, "setName": TEXT, "creatorId": TEXT, "hasUmap": TRUTH,
        "hasUmapLogSparsity": TRUTH, "hasUmapClusters": TRUTH, "num_prompts?": WHOLE,
        "num_tokens_in_prompt?": WHOLE, "dataset?": TEXT, "notes?": TEXT, "createdAt": TEXT,
    },
    "features": {
        "modelId": TEXT, "layer": TEXT, "index": TEXT, "sourceSetName?": TEXT, "creatorId?": TEXT,
        "createdAt": TEXT, "maxActApprox?": NUMBER, "hasVector": TRUTH, "vector": NUMBERS,
        "vectorLabel?": TEXT, "vectorDefaultSteerStrength?": NUMBER, "hookName?": TEXT,
        "topkCosSimIndices": [int], "topkCosSimValues": NUMBERS,
        **{f"neuron_alignment_{x}": NUMBERS for x in ("values", "l1")},
        **{f"correlated_{x}_{y}": NUMBERS for x in ("neurons", "features")
           for y in ("pearson", "l1")},
        "neuron_alignment_indices": [int], "correlated_neurons_indices": [int],
        "correlated_features_indices": [int], "neg_str": TEXTS, "neg_values": NUMBERS,
        "pos_str": TEXTS, "pos_values": NUMBERS, "frac_nonzero": NUMBER,
        "freq_hist_data_bar_heights": NUMBERS, "freq_hist_data_bar_values": NUMBERS,
        "logits_hist_data_bar_heights": NUMBERS, "logits_hist_data_bar_values": NUMBERS,
        "decoder_weights_dist": NUMBERS,
    },
    "activations": {
        "id": TEXT, "tokens": TEXTS, "dataIndex?": TEXT, "index": TEXT, "layer": TEXT,
        "modelId": TEXT, "dataSource?": TEXT, "maxValue": NUMBER, "maxValueTokenIndex": WHOLE,
        "minValue": NUMBER, "values": NUMBERS, "dfaValues": NUMBERS, "dfaTargetIndex?": WHOLE,
        "dfaMaxValue?": NUMBER, "creatorId": TEXT, "createdAt": TEXT, "lossValues": NUMBERS,
        "logitContributions?": TEXT, "binMin?": NUMBER, "binMax?": NUMBER, "binContains?": NUMBER,
        "qualifyingTokenIndex?": WHOLE,
    },
    "explanations": {
        "id": TEXT, "modelId": TEXT, "layer": TEXT, "index": TEXT, "description": TEXT,
        "authorId": TEXT, "notes?": TEXT, "typeName?": TEXT, "explanationModelName?": TEXT,
        "createdAt": TEXT, "updatedAt": TEXT,
    },
}  # fmt: skip
REQUIRED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
    "features": {"modelId", "layer", "index"},
    "activations": {"tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex",
                    "minValue", "values", "creatorId"},
    "explanations": {"modelId", "layer", "index", "description", "authorId"},
}  # fmt: skip
