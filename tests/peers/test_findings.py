


@pytest.fixture
def lycoris(torch):
    return pytest.importorskip("lycoris", reason="pip install lycoris-lora")


@pytest.fixture
def mlx_lm():
    core = pytest.importorskip("mlx.core", reason="pip install 'mlx[cpu]' mlx-lm")
    models = pytest.importorskip("mlx_lm.models.llama", reason="pip install mlx-lm")
    tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="pip install mlx-lm")
    core.set_default_device(core.cpu)
    sizes = {"hidden_size": 2, "num_hidden_layers": 2, "intermediate_size": 2, "vocab_size": 3}
    args = models.ModelArgs("llama", num_attention_heads=1, rms_norm_eps=1e-5, **sizes)
    return SimpleNamespace(
        core=core, args=models.ModelArgs, model=lambda: models.Model(args), tuner=tuner
    )


def identity(torch, factor=1.0):
    """A model of one projection, the identity times a factor."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    torch.nn.init.eye_(model[0].weight).data.mul_(factor)
    return model


def kohya_state(torch, at="lycoris_0"):
    """An adapter of rank 2 and alpha 8 as a file has it, A and B the identity."""
    eye = torch.eye(2)
    return {
        f"{at}.lora_down.weight": eye,
        f"{at}.lora_up.weight": eye,
        f"{at}.alpha": torch.tensor(8.0),
    }


def test_lycoris_loads_an_adapter_with_the_scale_it_was_built_with(torch, lycoris):
    """Seen in lycoris_lora 4.1.3."""
    W = x = np.eye(2)
    right, _ = lora_linear(x, W, None, np.eye(2), np.eye(2), scale(8, 2))

    model = identity(torch)
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1)
    network.apply_to()
    network.load_state_dict(kohya_state(torch), strict=True)
    assert network.loras[0].alpha == 8
    assert (model(torch.eye(2)).detach().numpy() == lora_linear(x, W, None, x, x, 1 / 2)[0]).all()

    model = identity(torch)
    network, _ = lycoris.create_lycoris_from_weights(1.0, "", model, kohya_state(torch))
    network.apply_to()
    assert (model(torch.eye(2)).detach().numpy() == right).all()


def test_lycoris_loads_an_adapter_of_another_model_as_none(torch, lycoris):
    """Seen in lycoris_lora 4.1.3."""
    state = kohya_state(torch, at="lycoris_layers_7_q")
    network, _ = lycoris.create_lycoris_from_weights(1.0, "", identity(torch), state)
    assert len(network.loras) == 0


def test_lycoris_fails_on_an_adapter_without_alpha(torch, lycoris):
    """Seen in lycoris_lora 4.1.3."""
    state = kohya_state(torch)
    for alpha, works in ((torch.tensor(0.0), True), (None, False)):
        state["lycoris_0.alpha"] = alpha
        given = {key: value for key, value in state.items() if value is not None}
        if works:
            network, _ = lycoris.create_lycoris_from_weights(1.0, "", identity(torch), given)
            assert network.loras[0].scale == 1
        else:
            with pytest.raises(TypeError, match="float"):
                lycoris.create_lycoris_from_weights(1.0, "", identity(torch), given)


def test_lycoris_starts_dora_as_another_function_where_rows_are_small(torch, lycoris):
    """Seen in lycoris_lora 4.1.3."""
    small = torch.finfo(torch.float32).eps
    model = identity(torch, small)
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, dora_wd=True)
    network.apply_to()
    W, B = small * np.eye(2), np.zeros((2, 2))
    right, _ = dora_linear(np.eye(2), W, None, np.eye(2), B, small * np.ones((2, 1)), 1 / 2)
    assert (right == W).all()
    assert (model(torch.eye(2)).detach().numpy() == W / 2).all()


def mlx_folder(path, tensors, num_layers=1):
    """An adapter of rank 1 for one projection of the last layers."""
    parameters = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
    said = {"num_layers": num_layers, "lora_parameters": parameters}
    (path / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, path / "adapters.safetensors")
    return str(path)


def test_mlx_lm_leaves_a_missing_factor_as_it_was_drawn(mlx_lm, tmp_path):
    """Seen in mlx_lm 0.32.2."""
    b = {"model.layers.1.mlp.up_proj.lora_b": np.ones((1, 2), np.float32)}
    folder = mlx_folder(tmp_path, b)
    changes = []
    for seed in (0, 1):
        mlx_lm.core.random.seed(seed)
        up = mlx_lm.tuner.load_adapters(mlx_lm.model(), folder).layers[1].mlp.up_proj
        changes.append(np.array(up.lora_b).T @ np.array(up.lora_a).T)
    assert (changes[0] != changes[1]).all()


def test_mlx_lm_adapts_all_layers_where_none_is_asked_for(mlx_lm):
    """Seen in mlx_lm 0.32.2."""
    parameters = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
    adapted = {}
    for count in (0, 1, 2):
        model = mlx_lm.model()
        mlx_lm.tuner.linear_to_lora_layers(model, count, parameters)
        adapted[count] = ["lora_a" in layer.mlp.up_proj for layer in model.layers]
    assert adapted == {0: [True, True], 1: [False, True], 2: [True, True]}


def test_mlx_lm_passes_over_the_base_of_rope_in_rope_parameters(mlx_lm):
    """Seen in mlx_lm 0.32.2."""
    c = Llama(vocab=3, d=4, layers=1, heads=1, ffn=2, kv_heads=1, head_dim=4, theta=5e5)
    written = config_to_json(c)
    assert written["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}
    taken = mlx_lm.args.from_dict(written).rope_theta
    assert taken == 1e4
    # The second pair of features turns by θ^(-1/2) per token.
    one = np.ones((1, 1))
    right, wrong = (rope_tables(one, 4, theta, float)[1] for theta in (c.theta, taken))
    assert (right != wrong).any()


def test_peft_warns_that_a_whole_bias_of_lora_b_is_a_shard(torch, peft):
    """Seen in peft 0.21.2."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 3))
    config = peft.LoraConfig(r=1, lora_bias=True, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    with pytest.warns(UserWarning, match=r"invalid shape: base_model.model.0.lora_B.bias:\(3,\)"):
        tensors = peft.get_peft_model_state_dict(model)
    bias = model.base_model.model[0].lora_B.default.bias
    assert torch.equal(tensors["base_model.model.0.lora_B.bias"], bias)  # whole, and right
