package federation

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestQueueOfAPeerThatIsAwayIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newOutboxWorld(t)
		w.bound = 40
		w.open()
		w.setRefuse(func(string, []OutboxItem) error { return errors.New("no route") })
		w.run()
		w.put("beta.example", "/welcome")
		w.put("beta.example", "quiet/000", "quiet/001")
		var flying []string // handed out, with a batch that comes late
		late := make(map[string][]byte)
		for i := range 500 {
			w.put("beta.example", fmt.Sprintf("loud/%03d", i))
			if i%2 == 0 {
				w.put("beta.example", fmt.Sprintf("less/%03d", i))
			}
			if i%100 == 50 {
				ref := fmt.Sprintf("late/%03d", i)
				k, v := w.box.Entry("beta.example", []byte(ref))
				late[string(k)], flying = v, append(flying, ref)
			}
			time.Sleep(time.Second)
			if n := w.box.Depth("beta.example"); n > 40+60 { // a pause is 30 s long
				t.Fatalf("%d wait", n)
			}
		}
		time.Sleep(time.Minute)
		if n := w.box.Depth("beta.example"); n > 50 || len(w.store.m) != n-len(flying) {
			t.Errorf("%d wait of %d in the store", n, len(w.store.m))
		}
		if dropped := w.box.Dropped("beta.example"); dropped < 700 {
			t.Errorf("%d were dropped", dropped)
		}
		if ok, err := w.store.Commit(late, nil); !ok || err != nil {
			t.Fatal(err)
		}
		w.setRefuse(nil)
		w.box.Wake("beta.example")
		time.Sleep(time.Minute)
		synctest.Wait()
		w.wantEmpty()
		shares := make(map[string][]string)
		for _, ref := range w.got["beta.example"] {
			share, number, _ := strings.Cut(ref, "/")
			shares[share] = append(shares[share], number)
		}
		for _, share := range slices.Sorted(maps.Keys(shares)) {
			if list := shares[share]; !slices.IsSorted(list) {
				t.Errorf("%s came as %v", share, list)
			}
		}
		if len(shares["quiet"]) != 2 || len(shares[""]) != 1 || len(shares["late"]) != len(flying) {
			t.Errorf("of those that had little came %v", shares)
		}
		for share, last := range map[string]string{"loud": "499", "less": "498"} {
			if list := shares[share]; len(list) < 10 || list[len(list)-1] != last {
				t.Errorf("of %s came %v", share, list)
			}
		}
		q := w.box.peers["beta.example"]
		if len(q.missing) != 0 || q.from != q.next {
			t.Errorf("%d numbers are missing below %d of %d", len(q.missing), q.from, q.next)
		}
		w.stop()
	})
}

func TestSharesAreFair(t *testing.T) {
	for _, c := range []struct {
		counts []int
		limit  int
		most   int
	}{
		{[]int{1, 2, 30}, 20, 17}, {[]int{10, 10}, 10, 5}, {[]int{5, 5, 5}, 2, 1}, {[]int{100, 1, 50}, 41, 20},
	} {
		counts := make(map[string]int)
		for i, n := range c.counts {
			counts[fmt.Sprint(i)] = n
		}
		if got := fairShare(counts, c.limit); got != c.most {
			t.Errorf("of %v within %d each keeps %d, want %d", c.counts, c.limit, got, c.most)
		}
	}
	if got := fairShare(map[string]int{"a": 3}, 3); got < 3 {
		t.Errorf("of what fits %d are kept", got)
	}
}
