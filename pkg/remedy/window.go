package remedy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
)

// WindowOpen reports whether a maintenance window is open at a moment; without
// a window it always is.
//
// It is judged by what a clock on the wall of its time zone shows, and by the
// weekday on which the window opened. That is what people mean by "Saturday,
// from 02:00 to 05:00", and it needs no rule of its own for the two nights of
// the year: an hour that is left out opens nothing, and a window over the hour
// that comes twice is open both times.
func WindowOpen(w *config.MaintenanceWindow, now time.Time) (bool, error) {
	if w == nil {
		return true, nil
	}
	zone, err := time.LoadLocation(w.TimeZone) // "" is UTC
	if err != nil {
		return false, fmt.Errorf("maintenance window: time zone %q is not known", w.TimeZone)
	}
	from, err := minutes(w.From)
	if err != nil {
		return false, err
	}
	to, err := minutes(w.To)
	if err != nil {
		return false, err
	}
	local := now.In(zone)
	wall := local.Hour()*60 + local.Minute()
	today := local.Weekday()
	yesterday := (today + 6) % 7
	if from <= to {
		return from <= wall && wall < to && opensOn(w, today), nil
	}
	return wall >= from && opensOn(w, today) || wall < to && opensOn(w, yesterday), nil
}

func opensOn(w *config.MaintenanceWindow, day time.Weekday) bool {
	return len(w.Days) == 0 || slices.Contains(w.Days, day.String()[:3])
}

func minutes(clock string) (int, error) {
	t, err := time.Parse("15:04", clock)
	if err != nil {
		return 0, fmt.Errorf("maintenance window: %q is no time of day", clock)
	}
	return t.Hour()*60 + t.Minute(), nil
}

// windowText is a window in words: "Sat, Sun 22:00 to 05:00 Europe/Berlin".
func windowText(w *config.MaintenanceWindow) string {
	days, zone := "every day", "UTC"
	if len(w.Days) > 0 {
		days = strings.Join(w.Days, ", ")
	}
	if w.TimeZone != "" {
		zone = w.TimeZone
	}
	return fmt.Sprintf("%s %s to %s %s", days, w.From, w.To, zone)
}
