"""The check of the kind `saliency`: the shares that a dump keeps held against those that a teacher gives now."""
