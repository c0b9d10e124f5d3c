package org.example.stock;

import java.util.Comparator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.concurrent.locks.ReentrantLock;
import java.util.stream.Collectors;

/** Counts parts on shelves. All methods may be called from any thread. */
public final class Inventory {
  public record Part(String sku, int quantity, int reorderAt) {
    public Part {
      Objects.requireNonNull(sku, "sku");
      if (quantity < 0) {
        throw new IllegalArgumentException("quantity of " + sku + " is " + quantity);
      }
    }
  }

  private final Map<String, Part> parts = new LinkedHashMap<>();
  private final ReentrantLock lock = new ReentrantLock();

  public void put(Part part) {
    lock.lock();
    try {
      parts.put(part.sku(), part);
    } finally {
      lock.unlock();
    }
  }

  /** Takes {@code count} pieces away, or throws and changes nothing. */
  public void take(String sku, int count) {
    lock.lock();
    try {
      parts.compute(sku, (key, part) -> {
        if (part == null) {
          throw new IllegalStateException("no such part: " + key);
        }
        return new Part(key, part.quantity() - count, part.reorderAt());
      });
    } finally {
      lock.unlock();
    }
  }

  public List<Part> toReorder() {
    lock.lock();
    try {
      return parts.values().stream()
          .filter(part -> part.quantity() <= part.reorderAt())
          .sorted(Comparator.comparingInt(Part::quantity).thenComparing(Part::sku))
          .collect(Collectors.toUnmodifiableList());
    } finally {
      lock.unlock();
    }
  }
}
