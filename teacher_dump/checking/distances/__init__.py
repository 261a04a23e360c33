"""The check of kinds of which one number a sequence tells how far what a dump keeps is from what a teacher gives now."""
