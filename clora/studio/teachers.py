"""The studio's twelve teachers."""

from clora.studio.teacher_files import TeacherSpec

SPECS = (
    TeacherSpec("negative", "diffusers", 16),
    TeacherSpec("thermal", "kohya", 16),
    TeacherSpec("blueprint", "comfyui", 16),
    TeacherSpec("sepia", "peft", 8, attention_only=True),
    TeacherSpec("gold_frame", "diffusers", 16),
    TeacherSpec("scanlines", "kohya", 12),
    TeacherSpec("vignette", "peft", 12),
    TeacherSpec("night_vision", "comfyui", 16),
    TeacherSpec("leaves", "diffusers", 16),
    TeacherSpec("fireflies", "peft", 16),
    TeacherSpec("snow", "comfyui", 16),
    TeacherSpec("colour_static", "kohya", 16),
)
TEACHERS = tuple(spec.effect for spec in SPECS)
