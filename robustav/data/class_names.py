"""Classes of corpora that published models were tuned to, in the order of these models' outputs."""

# ESC-50 [Piczak, 2015], in the order of its targets.
ESC50: tuple[str, ...] = (
    *("dog", "rooster", "pig", "cow", "frog", "cat", "hen", "insects", "sheep", "crow"),
    *("rain", "sea_waves", "crackling_fire", "crickets", "chirping_birds"),
    *("water_drops", "wind", "pouring_water", "toilet_flush", "thunderstorm"),
    *("crying_baby", "sneezing", "clapping", "breathing", "coughing"),
    *("footsteps", "laughing", "brushing_teeth", "snoring", "drinking_sipping"),
    *("door_wood_knock", "mouse_click", "keyboard_typing", "door_wood_creaks", "can_opening"),
    *("washing_machine", "vacuum_cleaner", "clock_alarm", "clock_tick", "glass_breaking"),
    *("helicopter", "chainsaw", "siren", "car_horn", "engine"),
    *("train", "church_bells", "airplane", "fireworks", "hand_saw"),
)

# Speech Commands V2 [Warden, 2018, arXiv:1804.03209], in the order of AST's outputs, which is not the alphabet's.
SPEECH_COMMANDS: tuple[str, ...] = (
    *("backward", "follow", "five", "bed", "zero", "on", "learn", "two", "house", "tree", "dog", "stop"),
    *("seven", "eight", "down", "six", "forward", "cat", "right", "visual", "four", "wow", "no", "nine"),
    *("off", "three", "left", "marvin", "yes", "up", "sheila", "happy", "bird", "go", "one"),
)
