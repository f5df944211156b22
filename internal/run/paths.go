package run

import (
	"os"
	"path/filepath"
)

// StateDir is where a daemon ("node", "cp", "relay") keeps its state unless it
// is told: /var/lib/autonomy/NAME for root, the XDG state directory for others.
// "" when there is neither: --state-dir must be given.
func StateDir(name string) string {
	if os.Geteuid() == 0 {
		return filepath.Join("/var/lib/autonomy", name)
	}
	base := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(base) { // the specification says to ignore others
		home, err := os.UserHomeDir()
		if err != nil {
			return ""
		}
		base = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(base, "autonomy", name)
}
