"""The names by which others call the CLIPs that open_clip knows."""


def alias(name: str) -> tuple[str, str | None]:
    """open_clip's name, and its tag if the name says it.

    OpenAI writes "ViT-L/14@336px"; timm's repositories are named as "timm/ARCHITECTURE.TAG", which
    its users write without "timm/" as well.
    """
    import open_clip

    for model, tag in open_clip.list_pretrained() if "." in name else ():
        repository = (open_clip.get_pretrained_cfg(model, tag).get("hf_hub") or "").strip("/")
        if repository.startswith("timm/") and repository in (name, f"timm/{name}"):
            return model, tag
    return name.replace("/", "-").replace("@336px", "-336"), None
